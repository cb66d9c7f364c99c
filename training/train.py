"""Train a GPT.

    accelerate launch training/train.py [CONFIG.yaml] [--name value ...]

Without arguments: a small model of Python source text, in a few minutes on a laptop.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.distributed.elastic.multiprocessing.errors import record as recorded_for_launcher

from data_prep.common import command_line
from data_prep.common.command_line import UserError
from data_prep.common.locks import locked
from eval.common.devices import processes_launched
from eval.common.scores import bits_per_byte
from eval.generate import Sampling, generate, isolated_random_state
from eval.harness import evaluate_tasks
from eval.loss import summed_loss
from training.checkpointing.snapshot import take_snapshot
from training.checkpointing.storage import checkpoint_folder, is_checkpoint, prune_checkpoints
from training.engine.batches import DataError
from training.engine.distributed import is_lost_process
from training.engine.optimizer import set_learning_rate
from training.engine.profiling import profiling
from training.engine.step import training_step
from training.loop.ending import finish, report
from training.loop.run import Run
from training.loop.stopping import StopRequest, stop_requests
from training.records import screen
from training.records.step_metrics import LaunchedStep, over_processes
from training.resilience.divergence import Diverged, is_skipped
from training.resilience.preflight import get_out_of_the_way, own_folder, preflight, remove_if_empty
from training.resilience.recovery import go_back, see_to
from training.resilience.resume import AlreadyFinished
from training.settings.parsing import parse_config
from training.settings.schema import TrainingConfig
from training.settings.validation import check_config
from training.setup import setup


def main() -> None:
    is_first = os.environ.get("RANK", "0") == "0"
    screen.install()
    try:
        config = parse_config(sys.argv[1:])
        check_config(config, processes_launched())
    except UserError:
        if not is_first:
            sys.exit(2)  # the first process says it for all
        raise
    if config.run.preflight:
        get_out_of_the_way(config)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_requests(config.run.max_minutes))
        if is_first:
            if config.run.preflight:
                stack.callback(remove_if_empty, config.run_folder, config.run_folder.parent)
            stack.enter_context(locked(config.run_folder))
            if config.run.preflight:
                stack.enter_context(own_folder(config.run_folder))
        try:
            whole_run(config, stop)
        except AlreadyFinished as finished:
            if is_first:
                print(finished)


def whole_run(config: TrainingConfig, stop: StopRequest) -> None:
    """A run from its start, or from where it was, to its end, or to where it is asked to stop."""
    run = setup(config, stop)
    failed = True
    try:
        if config.run.preflight:
            preflight(run)
        else:
            to_the_end(run)
        failed = False
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise UserError(
            f"process {run.accelerator.process_index} lost its connection to another process of the run, whose own "
            f"message says why; --resume goes on from the last checkpoint"
        ) from error
    except KeyboardInterrupt:
        run.log.print(f"\nstopped in step {run.state.step}; --resume goes on from the last checkpoint")
        raise
    finally:
        run.saver.close()
        announce(run)
        run.close(failed)
    if run.uploads is not None:
        for message in run.uploads.finish(lambda: run.stopping or bool(stop)):
            print(message, flush=True)
    if not config.run.preflight:
        finish(run)


def to_the_end(run: Run) -> None:
    """All steps, and the report; or as many as there are before the run is asked to stop."""
    debug = run.config.debug
    folder = run.config.run_folder / "profile" if debug.profile and run.accelerator.is_main_process else None
    with profiling(folder) as step_done, torch.autograd.set_detect_anomaly(debug.detect_anomaly):
        fit(run, step_done)
    run.saver.finish()
    announce(run)
    if not run.stopping:
        report(run)


def fit(run: Run, step_done: Callable[[], None]) -> None:
    """The life of a run. Whenever the top of the loop is reached, `state.step` optimizer steps are done or in flight.

    Args:
        step_done: called after each step.
    """
    settings, end = run.config.run, run.config.max_steps
    came_from = run.state.step  # where there is a checkpoint, or nothing to save
    while True:
        step = run.state.step
        last = step == end
        saving = last or (step > 0 and step % settings.save_every == 0)
        validating = saving or step % settings.val_every == 0
        try:
            if validating:
                agree_on_stopping(run)
            if (saving or run.stopping) and step > came_from:
                save(run)
            if run.stopping:
                break
            if validating:
                validate(run, saved=saving)
            if settings.hellaswag_every and (last or step % settings.hellaswag_every == 0):
                hellaswag(run)
            if settings.lm_eval_every and (last or (step > 0 and step % settings.lm_eval_every == 0)):
                harness(run)
            if settings.sample_every and (last or (step > 0 and step % settings.sample_every == 0)):
                sample(run)
            if saving and run.accelerator.is_main_process:
                put_away(run)
            if last:
                break
            train(run)
            step_done()
        except Diverged as diverged:
            go_back(run, diverged)
            came_from = run.state.step
        except DataError as lost:
            if run.accelerator.num_processes == 1 and step > came_from:  # a checkpoint needs all processes
                save_without_data(run)
            raise UserError(
                f"step {run.state.step}: {lost}; once it is there again, --resume goes on from the last checkpoint"
            ) from lost


def train(run: Run) -> None:
    """Begin one optimizer step, and record the one before it, which the device was at until now."""
    accelerator, config, state = run.accelerator, run.config, run.state
    consumed = state.position * config.sequence_length
    batch_tokens = run.batch_plan.size(consumed)
    factor = run.schedule.at(state.step, consumed, batch_tokens)
    set_learning_rate(run.optimizer, factor)
    following = state.position + batch_tokens // config.sequence_length
    if is_skipped(state.skipped, state.position, following):
        record_last(run)
        run.log.skipped(state.step, state.position, following)
        state.step, state.position = state.step + 1, following
        return

    run.meter.begin()
    started = time.perf_counter()
    micro_batches = run.prefetcher.take(state.position, following)
    waited = time.perf_counter() - started
    results = training_step(
        accelerator, run.model, run.optimizer, micro_batches, config.optimizer.max_grad_norm, config.optimizer.z_loss
    )
    before = run.meter.launch(
        step=state.step,
        batch=(state.position, following),
        tokens=consumed + batch_tokens,
        batch_tokens=batch_tokens,
        learning_rate=factor * config.optimizer.learning_rate,
        grad_norm=results["grad_norm"],
        of_processes=over_processes(accelerator, results, waited, bool(run.stop)),
    )
    if before is not None:
        record(run, before)
    state.step, state.position = state.step + 1, following
    if accelerator.device.type == "cpu":  # where nothing is in flight
        record_last(run)
    announce(run)


def record_last(run: Run) -> None:
    """Write down what came of the last step, if that has not been done."""
    if (done := run.meter.take()) is not None:
        record(run, done)


def record(run: Run, done: LaunchedStep) -> None:
    """Write down what came of a step, and see to it if it went wrong; the host waits for the device here and nowhere
    else."""
    metrics, stop = done.finish()
    run.stopping |= stop
    metrics["mfu"] = run.flops_utilisation(metrics["tokens_per_second"])
    run.log.train(done.step, metrics)
    run.track(metrics, done.step)
    for message in run.uploads.look(done.step) if run.uploads is not None else ():
        run.log.print(message)
    see_to(run, done, metrics)


def save_without_data(run: Run) -> None:
    """Save the steps that have been done, if they are not saved yet."""
    if not is_checkpoint(checkpoint_folder(run.checkpoints, run.state.step)):
        with contextlib.suppress(Diverged):  # of the last step: there is no going back without data
            save(run)
    run.saver.finish()
    announce(run)


def agree_on_stopping(run: Run) -> None:
    """Ask all processes whether to stop, before what takes longer than a step."""
    record_last(run)
    run.stopping |= run.sum_over_processes(float(bool(run.stop)))[0] > 0


def validate(run: Run, saved: bool) -> None:
    """The loss of the whole validation set of this run, each process taking its share of it."""
    accelerator, state = run.accelerator, run.state
    batches = run.val_data.shared_out(
        run.val_sequences, run.config.optimizer.micro_batch, accelerator.process_index, accelerator.num_processes
    )
    nats, tokens = run.sum_over_processes(*summed_loss(run.bare_model, batches))
    loss = nats / tokens
    consumed = run.data.consumed(run.train_data, state.position)
    run.log.validation(state.step, loss, bits_per_byte(nats, run.val_bytes), consumed)
    run.track({"val_loss": loss, "val_bits_per_byte": bits_per_byte(nats, run.val_bytes)}, state.step)
    if saved and math.isfinite(loss) and (state.best_val_loss is None or loss < state.best_val_loss):
        state.best_val_loss, state.best_step = loss, state.step


def hellaswag(run: Run) -> None:
    """The accuracy on HellaSwag under each of the run's rules, the processes sharing the items."""
    record_last(run)
    for task in run.hellaswag:
        result = task.evaluate(run.accelerator, run.bare_model)
        run.log.hellaswag(run.state.step, result)
        run.track(result.metrics(), run.state.step)


def harness(run: Run) -> None:
    """The scores on tasks of the lm-evaluation-harness; its results are kept beside the checkpoints."""
    record_last(run)
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
    run.track(scores, step)


def sample(run: Run) -> None:
    """Continue each prompt, with random numbers that training does not share."""
    record_last(run)
    settings = run.config.run
    for number, prompt in enumerate(settings.sample_prompts):
        # Generation asks for a new compilation at every layer and length; past their limit training would lose its own.
        with torch.compiler.set_stance("force_eager"):
            sampling = Sampling(max_new_tokens=settings.sample_tokens, seed=settings.seed + number)
            (text,) = generate(run.bare_model, run.tokenizer, prompt, sampling).texts
        run.log.sample(run.state.step, prompt, text)
        run.track({f"sample/{number}": prompt + text}, run.state.step)


def save(run: Run) -> None:
    """Begin to write a checkpoint of the step that has just been done."""
    record_last(run)
    run.log.flush()
    run.saver.wait()  # two copies of everything would be one too many
    snapshot = take_snapshot(run.accelerator, run.model, run.optimizer, run.state, run.tokenizer_files)
    if snapshot is not None:
        run.saver.save(snapshot)


def put_away(run: Run) -> None:
    """Let the checkpoint of this step be uploaded, if it is to be, and remove those that are not to be kept."""
    step, settings, hub = run.state.step, run.config.run, run.config.hub
    wanted = {"end": step == run.config.max_steps, "best": step == run.state.best_step}
    if run.uploads is not None and wanted.get(hub.hub_strategy, True):
        run.uploads.expect(checkpoint_folder(run.checkpoints, step))
    prune = partial(prune_checkpoints, run.checkpoints, settings.keep_last, settings.keep_every, run.state.best_step)
    run.saver.afterwards("an older checkpoint could not be removed", prune)


def announce(run: Run) -> None:
    """Show what has become of the checkpoints that were being written."""
    for message in run.saver.messages():
        run.log.print(message)


if __name__ == "__main__":
    command_line.run(recorded_for_launcher(main))
