"""Train a GPT.

    accelerate launch training/train.py [CONFIG.yaml] [--name value ...]

Without arguments: a small model of Python source text, in a few minutes on a laptop.
"""

import contextlib
import math
import os
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
from training.build import setup
from training.checkpointing.checkpoint import take_snapshot
from training.checkpointing.store import AlreadyFinished, checkpoint_folder, prune_checkpoints
from training.engine.data import DataError
from training.engine.distributed import is_lost_process
from training.engine.optimizer import set_learning_rate
from training.engine.step import training_step
from training.monitoring.divergence import Diverged, handle_divergence, rollback
from training.monitoring.log import install_screen
from training.monitoring.metrics import LaunchedStep, gather_metrics, read_gpu
from training.monitoring.stopping import StopRequest, stop_requests
from training.preflight import apply_preflight_overrides, own_folder, preflight
from training.publishing import pending
from training.run import EvaluationStopped, Run, print_ending, write_run_report
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
            stack.enter_context((own_folder if config.run.preflight else locked)(config.run_folder))
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
    run = setup(config, stop)
    failed = True
    try:
        if config.run.preflight:
            preflight(run)
        else:
            train_and_report(run)
        failed = False
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise UserError(
            f"rank {run.accelerator.process_index} lost its connection to another rank, whose own message says why; "
            f"--resume_from_checkpoint continues from the last checkpoint"
        ) from error
    except DataError as lost:
        save_without_data(run)
        raise UserError(
            f"step {run.state.step}: {lost}; once the data can be read again, --resume_from_checkpoint continues from "
            f"the last checkpoint"
        ) from lost
    except KeyboardInterrupt:
        run.log.print(
            f"\nstopped in step {run.state.step}; --resume_from_checkpoint continues from the last checkpoint"
        )
        raise
    finally:
        run.saver.close()
        print_saver_messages(run)
        run.close(failed)
    if run.uploads is not None:
        for message in run.uploads.finish(lambda: run.stopping or bool(stop)):
            print(message, flush=True)
    if not config.run.preflight:
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
    print_saver_messages(run)
    if not run.stopping:
        write_run_report(run)


def training_loop(run: Run) -> None:
    """Trains to the last step or a request to stop."""
    save_and_evaluate(run)
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
        save_and_evaluate(run)


def save_and_evaluate(run: Run) -> None:
    """Saves and evaluates what is due after a step, or at the start.

    Saves first, so that an evaluation that crashes or is killed loses no steps; then a new lowest validation loss is
    saved too. A step is saved once.
    """
    state = run.state
    if due := run.due_evaluations():  # evaluations take longer than a step
        finish_last_step(run)
        run.agree_on_stopping()
    if run.save_due or run.stopping:
        save(run)
    with contextlib.suppress(EvaluationStopped):
        for evaluation in () if run.stopping else due:
            metrics = evaluation.run(run)
            run.log_metrics(metrics, state.step)
            if run.is_own_step and state.update_best(metrics.get("val_loss", math.nan)):
                save(run)
    if run.stopping:
        save(run)
    elif state.step == run.saved_step and run.accelerator.is_main_process:
        publish_and_prune(run)


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
    print_saver_messages(run)


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


def save_without_data(run: Run) -> None:
    """Saves the steps that are done after the data became unreadable; not with several ranks, which it would take."""
    if run.accelerator.num_processes == 1:
        with contextlib.suppress(Diverged):  # a rollback would need data
            save(run)
    run.saver.finish()


def publish_and_prune(run: Run) -> None:
    """Queues the checkpoint of this step for upload, if it is wanted, and removes those that are not kept."""
    step, kept, hub = run.state.step, run.config.checkpointing, run.config.hub
    wanted = {"end": step == run.config.max_steps, "best": step == run.state.best_step}
    if run.uploads is not None and wanted.get(hub.hub_strategy, True):
        run.uploads.enqueue(checkpoint_folder(run.checkpoints, step))
    uploading = pending(run.config.run_folder) if run.uploads is not None else []
    limits = (kept.save_total_limit, kept.keep_every, run.state.best_step)
    prune = partial(prune_checkpoints, run.checkpoints, *limits, uploading)
    run.saver.afterwards("an older checkpoint could not be removed", prune)


def print_saver_messages(run: Run) -> None:
    """Prints the results of the checkpoints that were being written."""
    for message in run.saver.messages():
        run.log.print(message)


if __name__ == "__main__":
    run_command(partial(show_errors_in_launcher(main), CONFIG))
