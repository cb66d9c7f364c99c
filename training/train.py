"""Train a GPT.

    accelerate launch training/train.py [CONFIG.yaml] [--name value ...]

Without arguments: a small model of Python source text, in a few minutes on a laptop.
"""

import os
import sys
import time
from collections.abc import Callable

import torch

from data_prep import cli
from data_prep.cli import UserError
from eval.generate import Sampling, generate, isolated_random_state
from eval.harness import evaluate_tasks
from eval.launch import processes_launched
from eval.loss import bits_per_byte, summed_loss
from training.checkpoint import complete_checkpoints, prune_checkpoints, save_checkpoint
from training.checks import check_config
from training.config import parse_config
from training.meter import StepInFlight, over_processes
from training.metrics import log_pictures
from training.optimizer import set_learning_rate
from training.profiling import profiling
from training.setup import Run, setup
from training.step import training_step


def main() -> None:
    try:
        config = parse_config(sys.argv[1:])
        check_config(config, processes_launched())
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)  # the first process says it for all
        raise
    run = setup(config)
    debug = config.debug
    try:
        folder = config.run_folder / "profile" if debug.profile and run.accelerator.is_main_process else None
        with profiling(folder) as step_done, torch.autograd.set_detect_anomaly(debug.detect_anomaly):
            fit(run, step_done)
        report(run)
    except KeyboardInterrupt:
        if complete_checkpoints(run.checkpoints):
            run.log.print(f"\nstopped in step {run.state.step}; --resume goes on from the last checkpoint")
        raise
    finally:
        run.close()
    finish(run)


def fit(run: Run, step_done: Callable[[], None]) -> None:
    """The life of a run. Whenever the top of the loop is reached, `state.step` optimizer steps are done or in flight.

    Args:
        step_done: called after each step.
    """
    settings, state = run.config.run, run.state
    first, end = state.step, run.config.max_steps
    while True:
        last = state.step == end
        saving = last or (state.step > 0 and state.step % settings.save_every == 0)
        if saving and state.step > first:
            save(run)
        if saving or state.step % settings.val_every == 0:
            validate(run, saved=saving)
        if settings.hellaswag_every and (last or state.step % settings.hellaswag_every == 0):
            hellaswag(run)
        if settings.lm_eval_every and (last or (state.step > 0 and state.step % settings.lm_eval_every == 0)):
            harness(run)
        if settings.sample_every and (last or (state.step > 0 and state.step % settings.sample_every == 0)):
            sample(run)
        if saving and run.accelerator.is_main_process:
            prune_checkpoints(run.checkpoints, settings.keep_last, state.best_step)
        if last:
            break
        train(run)
        step_done()


def train(run: Run) -> None:
    """Begin one optimizer step, and record the one before it, which the device was at until now."""
    accelerator, config, state = run.accelerator, run.config, run.state
    consumed = state.position * config.sequence_length
    batch_tokens = run.batch_plan.size(consumed)
    factor = run.schedule.at(state.step, consumed, batch_tokens)
    set_learning_rate(run.optimizer, factor)

    started = time.perf_counter()
    following = state.position + batch_tokens // config.sequence_length
    micro_batches = run.train_ahead.take(state.position, following)
    waited = time.perf_counter() - started
    results = training_step(
        accelerator, run.model, run.optimizer, micro_batches, config.optimizer.max_grad_norm, config.optimizer.z_loss
    )
    begun = StepInFlight(
        step=state.step,
        tokens=consumed + batch_tokens,
        batch_tokens=batch_tokens,
        learning_rate=factor * config.optimizer.learning_rate,
        started=started,
        grad_norm=results["grad_norm"],
        of_processes=over_processes(accelerator, results, waited),
    )
    record(run)
    run.in_flight = begun
    if accelerator.device.type == "cpu":  # where nothing is in flight
        record(run)
    state.step += 1
    state.position = following


def record(run: Run) -> None:
    """Write down what came of the step in flight, if there is one; the host waits for it here and nowhere else."""
    if run.in_flight is None:
        return
    step, metrics = run.in_flight.step, run.in_flight.finish(run.recorded_at)
    run.in_flight, run.recorded_at = None, time.perf_counter()
    metrics["mfu"] = run.flops_utilisation(metrics["tokens_per_second"])
    run.log.train(step, metrics)
    run.accelerator.log(metrics, step=step)


def validate(run: Run, saved: bool) -> None:
    """The loss of the whole validation set of this run, each process taking its share of it."""
    record(run)
    accelerator, state = run.accelerator, run.state
    batches = run.val_data.shared_out(
        run.val_sequences, run.config.optimizer.micro_batch, accelerator.process_index, accelerator.num_processes
    )
    nats, tokens = run.sum_over_processes(*summed_loss(run.bare_model, batches))
    loss = nats / tokens
    consumed = run.data.consumed(run.train_data, state.position)
    run.log.validation(state.step, loss, bits_per_byte(nats, run.val_bytes), consumed)
    accelerator.log({"val_loss": loss, "val_bits_per_byte": bits_per_byte(nats, run.val_bytes)}, step=state.step)
    if saved and (state.best_val_loss is None or not loss >= state.best_val_loss):
        state.best_val_loss, state.best_step = loss, state.step


def hellaswag(run: Run) -> None:
    """The accuracy on HellaSwag under each of the run's rules, the processes sharing the items."""
    record(run)
    for task in run.hellaswag:
        result = task.evaluate(run.accelerator, run.bare_model)
        run.log.hellaswag(run.state.step, result)
        run.accelerator.log(result.metrics(), step=run.state.step)


def harness(run: Run) -> None:
    """The scores on tasks of the lm-evaluation-harness; its results are kept beside the checkpoints."""
    record(run)
    settings, step = run.config.run, run.state.step
    run.checkpoints.mkdir(exist_ok=True)
    with isolated_random_state(settings.seed, run.accelerator.device), torch.compiler.set_stance("force_eager"):
        scores = evaluate_tasks(
            run.accelerator,
            run.bare_model,
            run.tokenizer,
            settings.lm_eval_tasks,
            run.task_manager,
            output=run.checkpoints / f"step_{step:08d}.lm_eval.json",
            limit=settings.lm_eval_limit,
        )
    run.log.harness(step, scores)
    run.accelerator.log(scores, step=step)


def sample(run: Run) -> None:
    """Continue each prompt, with random numbers that training does not share."""
    record(run)
    settings = run.config.run
    for number, prompt in enumerate(settings.sample_prompts):
        # Generation asks for a new compilation at every layer and length; past their limit training would lose its own.
        with torch.compiler.set_stance("force_eager"):
            sampling = Sampling(max_new_tokens=settings.sample_tokens, seed=settings.seed + number)
            (text,) = generate(run.bare_model, run.tokenizer, prompt, sampling).texts
        run.log.sample(run.state.step, prompt, text)
        run.accelerator.log({f"sample/{number}": prompt + text}, step=run.state.step)


def save(run: Run) -> None:
    """Write a checkpoint of the step that has just been done."""
    record(run)
    run.log.flush()
    folder = save_checkpoint(
        run.accelerator, run.model, run.optimizer, run.state, run.data.tokenizer_folder, run.checkpoints
    )
    run.log.print(f"step {run.state.step:>6}  saved {folder}")


def report(run: Run) -> None:
    """Write the report of the run, and show its pictures in the trackers."""
    run.log.close()
    if not run.accelerator.is_main_process:
        return
    from eval.logs import read_run
    from eval.report import write_report

    try:
        folder = write_report([read_run(run.config.run_folder)], run.config.run_folder / "report").parent
    except UserError as error:  # of data that has changed since: the run is none the worse for it
        print(f"no report: {error}")
        return
    for tracker in run.accelerator.trackers:
        log_pictures(tracker, sorted(folder.glob("*.png")), run.state.step)


def finish(run: Run) -> None:
    """Say what has become of the run, and what can be done with it."""
    if not run.accelerator.is_main_process:
        return
    folder, last = run.config.run_folder, run.checkpoints / f"step_{run.state.step:08d}"
    best = run.checkpoints / f"step_{run.state.best_step:08d}"
    print(
        f"\nreport           {folder / 'report' / 'report.md'}\n"
        f"last checkpoint  {last}\n"
        f"best checkpoint  {best} (validation loss {run.state.best_val_loss:.4f})\n"
        f"\nNow try\n"
        f"  python -m eval.generate {last} --prompt {run.config.run.sample_prompts[0]!r}\n"
        f"  python -m eval.loss {last} --data {run.data.folders[0]}\n"
        f"  accelerate launch training/train.py {folder / 'config.yaml'} --run_name {folder.name}_longer "
        f"--max_steps {2 * run.config.max_steps}"
    )


if __name__ == "__main__":
    cli.run(main)
