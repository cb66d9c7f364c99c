"""Train a GPT.

    accelerate launch training/train.py [CONFIG.yaml] [--name value ...]

Without arguments: a small model of Python source text, in a few minutes on a laptop.
"""

import contextlib
import math
import os
import shlex
from functools import partial

from data_prep.common.command_line import UserError, first_line
from data_prep.common.command_line import run as run_command
from training.settings.reading import read_config

if __name__ == "__main__":
    CONFIG = run_command(read_config)  # before torch is loaded: a wrong setting is reported within a second

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record as show_errors_in_launcher

from data_prep.common.locks import locked
from eval.report import PAGE_NAME
from training.build_run import build_run
from training.checkpointing.checkpoint import take_snapshot
from training.checkpointing.store import checkpoint_folder
from training.engine.data import DataError
from training.engine.distributed import is_lost_process
from training.engine.optimizer import set_learning_rate
from training.engine.step import training_step
from training.monitoring.divergence import Diverged, handle_divergence, rollback
from training.monitoring.log import install_screen
from training.monitoring.metrics import LaunchedStep, gather_metrics, read_gpu
from training.preflight import apply_preflight_overrides, preflight, preflight_folder
from training.publishing import pending
from training.resume import AlreadyFinished
from training.run import EvaluationStopped, Run, StopRequest, stop_requests
from training.settings.schedule import Step
from training.settings.schema import TrainingConfig


def main(config: TrainingConfig) -> None:
    install_screen()
    is_first = os.environ.get("RANK", "0") == "0"
    if config.run.preflight:
        config = apply_preflight_overrides(config)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_requests(config.run.max_minutes))
        if is_first:
            stack.enter_context((preflight_folder if config.run.preflight else locked)(config.run_folder))
        try:
            run_training(config, stop)
        except AlreadyFinished as finished:
            if is_first:
                print(finished)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory on the device ({first_line(error)}); give a smaller --per_device_train_batch_size than "
                f"the batch printed above has, or auto, or --gradient_checkpointing true"
            ) from error


def run_training(config: TrainingConfig, stop: StopRequest) -> None:
    """Runs a training, or the rest of it, to its end or to a request to stop."""
    with build_run(config, stop) as run:
        try:
            (preflight if config.run.preflight else train_and_report)(run)
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            raise UserError(
                f"rank {run.accelerator.process_index} lost its connection to a peer; see that rank's error; "
                f"--resume_from_checkpoint continues from the last checkpoint"
            ) from error
        except DataError as lost:
            if run.accelerator.num_processes == 1:  # with several it would take all ranks
                with contextlib.suppress(Diverged):  # a rollback would need data
                    save(run)
            run.saver.finish()
            raise UserError(
                f"step {run.state.step}: {lost}; once the data can be read again, --resume_from_checkpoint continues "
                f"from the last checkpoint"
            ) from lost
        except KeyboardInterrupt:
            run.log.print(
                f"\nstopped in step {run.state.step}; --resume_from_checkpoint continues from the last checkpoint"
            )
            raise
    if run.uploads is not None:
        for message in run.uploads.finish(lambda: run.stopping or bool(stop)):
            print(message, flush=True)
    if run.accelerator.is_main_process and not config.run.preflight:
        print_ending(run)


def train_and_report(run: Run) -> None:
    """Trains to the end and writes the report; after a request to stop there is no report."""
    while True:
        try:
            training_loop(run)
            break
        except Diverged as diverged:
            rollback(run, diverged)
    run.saver.finish()
    run.print_saver_messages()
    if not run.stopping:
        write_run_report(run)


def training_loop(run: Run) -> None:
    """Trains to the last step or a request to stop.

    A step is saved before it is evaluated, so that an evaluation that crashes or is killed loses no steps. No step is
    saved twice.
    """
    evaluate(run)
    publish_and_prune(run)
    while not run.is_over:
        step = run.next_step()
        if step.is_skipped:
            skip(run, step)
        else:
            set_learning_rate(run.optimizer, step.learning_rate_factor)
            results = training_step(
                run.accelerator, run.model, run.optimizer, run.micro_batches(step), run.config.optimizer.max_grad_norm
            )
            log(run, step, results)
        if run.save_due:
            save(run)
        evaluate(run)
        publish_and_prune(run)
    save(run)


def skip(run: Run, step: Step) -> None:
    """Counts a step without an update: its batch made the loss diverge."""
    finish_last_step(run)
    run.log.skipped(step.number, *step.batch)
    run.state.advance(step)


def log(run: Run, step: Step, results: dict[str, Tensor]) -> None:
    """Gathers the metrics of a launched step; on a GPU reads those of the step before it, while the device works."""
    launched = gather_metrics(run.accelerator, step, results, run.prefetcher.waited, bool(run.stop))
    run.state.advance(step)
    finish_step(run, run.metrics.push(launched))
    run.print_saver_messages()


def finish_last_step(run: Run) -> None:
    """Reads and logs the metrics of the launched step, if there is one."""
    finish_step(run, run.metrics.pop())


def finish_step(run: Run, launched: LaunchedStep | None) -> None:
    """Reads and logs the metrics of a step, and handles divergence. Only here does the host wait for the device."""
    if launched is None:
        return
    metrics, stop = run.metrics.read(launched)
    number = launched.step.number
    run.stopping |= stop
    metrics["mfu"] = run.flops_utilization(metrics["tokens_per_second"])
    if run.accelerator.is_main_process and (number + 1) % run.config.logging.logging_steps == 0:
        metrics |= read_gpu(run.accelerator.device)
    run.log_metrics(metrics, number)
    for message in run.uploads.poll(number) if run.uploads is not None else ():
        run.log.print(message)
    handle_divergence(run, launched.step, metrics)


def evaluate(run: Run) -> None:
    """Runs the evaluations that are due; a new lowest validation loss is saved at once. Collective."""
    due = run.due_evaluations()
    if due:  # they take longer than a step
        finish_last_step(run)
        run.agree_on_stopping()
    with contextlib.suppress(EvaluationStopped):
        for evaluation in () if run.stopping else due:
            metrics = evaluation.run(run)
            run.log_metrics(metrics, run.state.step)
            if run.is_own_step and run.state.update_best(metrics.get("val_loss", math.nan)):
                save(run)


def save(run: Run) -> None:
    """Starts to write a checkpoint of the last step, unless there is one, or nothing to save yet. Collective."""
    if run.state.step in (run.first_step, run.saved_step):
        return
    finish_last_step(run)
    run.log.flush()
    run.saver.wait()  # a second snapshot beside the first would need twice the memory
    snapshot = take_snapshot(run.accelerator, run.model, run.optimizer, run.state, run.tokenizer_files)
    if snapshot is not None:
        run.saver.save(snapshot)
    run.saved_step = run.state.step


def publish_and_prune(run: Run) -> None:
    """Queues the checkpoint of this step, if there is one, for upload, and removes those that are not kept."""
    step, kept, hub = run.state.step, run.config.checkpointing, run.config.hub
    if step != run.saved_step or run.stopping or not run.accelerator.is_main_process:
        return
    wanted = {"end": step == run.config.max_steps, "best": step == run.state.best_step}
    if run.uploads is not None and wanted.get(hub.hub_strategy, True):
        run.uploads.enqueue(checkpoint_folder(run.checkpoints, step))
    uploading = pending(run.config.run_folder) if run.uploads is not None else []
    run.saver.prune(kept.save_total_limit, kept.keep_every, run.state.best_step, uploading)


def write_run_report(run: Run) -> None:
    """Writes the report of the run."""
    run.log.finish()
    if not run.accelerator.is_main_process:
        return
    from eval.report import write_report
    from eval.reporting.records import read_run

    try:
        write_report([read_run(run.config.run_folder)], run.config.report_folder)
    except Exception as error:  # the records were changed meanwhile; the run itself has succeeded
        print(f"no report: {first_line(error)}")


def print_ending(run: Run) -> None:
    """Prints where the run has ended, its results, and commands to try next."""
    folder, last = run.config.run_folder, checkpoint_folder(run.checkpoints, run.state.step)
    if run.stopping:
        resume = f"the same command with --resume_from_checkpoint continues from {last}"
        remedy = resume if last.exists() else "this run has no checkpoint yet"
        print(f"\nstopped after step {run.state.step} ({run.stop_reason}); {remedy}")
        return
    best, repository = "none: no validation loss was finite", run.config.hub.hub_model_id
    if run.state.best_step is not None:
        path = checkpoint_folder(run.checkpoints, run.state.best_step)
        shown = path if path.exists() else "was not written"
        best = f"{shown} (validation loss {run.state.best_val_loss:.4f})"
    report = run.config.report_folder / PAGE_NAME
    longer = ["accelerate", "launch", "training/train.py", f"{folder}/config.yaml", "--output_dir", f"{folder}_longer"]
    longer += ["--max_steps", str(2 * run.config.max_steps)]
    longer += ["--hub_model_id", f"{repository}_longer"] if run.config.hub.push_to_hub else []
    prompt = next(iter(run.config.evaluation.sample_prompts), "")
    commands = [
        ["python", "-m", "eval.generate", str(last), "--prompt", prompt],
        ["python", "-m", "eval.loss", str(last), "--data", run.data.names[0]],
        longer,
    ]
    if not run.config.hub.push_to_hub:
        commands.append(["python", "-m", "training.publish", str(folder), "--hub_model_id", "USER/NAME"])
    print(
        f"\nreport           {report if report.exists() else 'was not written'}\n"
        f"last checkpoint  {last}\n"
        f"best checkpoint  {best}\n"
        "\nNow try",
        *map(shlex.join, commands),
        sep="\n  ",
    )


if __name__ == "__main__":
    run_command(partial(show_errors_in_launcher(main), CONFIG))
