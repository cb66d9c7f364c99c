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

from data_prep.common.command_line import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import torch
from torch.distributed.elastic.multiprocessing.errors import record as show_errors_in_launcher

from data_prep.common.command_line import UserError, first_line
from data_prep.common.command_line import run as run_command
from data_prep.common.locks import locked
from eval.common.launch import processes_launched
from training.checkpointing.snapshot import take_snapshot
from training.checkpointing.storage import checkpoint_folder, is_checkpoint, prune_checkpoints
from training.engine.batches import DataError
from training.engine.distributed import is_lost_process
from training.engine.optimizer import set_learning_rate
from training.engine.profiling import profiling
from training.engine.step import training_step
from training.loop.ending import print_ending, write_run_report
from training.loop.run import EvaluationStopped, Run
from training.loop.stopping import StopRequest, stop_requests
from training.publishing.uploader import pending
from training.records import screen
from training.records.gpu_state import read_gpu
from training.records.step_metrics import LaunchedStep, gather_metrics
from training.resilience.divergence import Diverged, is_skipped
from training.resilience.preflight import apply_preflight_overrides, own_folder, preflight, remove_if_empty
from training.resilience.recovery import handle_divergence, rollback
from training.resilience.resume import AlreadyFinished
from training.settings.config import TrainingConfig
from training.settings.validation import load_config
from training.setup import setup


def main() -> None:
    is_first = os.environ.get("RANK", "0") == "0"
    screen.install()
    try:
        config = load_config(sys.argv[1:], processes_launched())
    except UserError:
        if not is_first:
            sys.exit(2)  # the first rank prints the error for all
        raise
    if config.run.preflight:
        apply_preflight_overrides(config)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_requests(config.run.max_minutes))
        if is_first:
            if config.run.preflight:
                stack.callback(remove_if_empty, config.run_folder, config.run_folder.parent)
            stack.enter_context(locked(config.run_folder))
            if config.run.preflight:
                stack.enter_context(own_folder(config.run_folder))
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
    """Runs a whole training, or the rest of it, until its end or a request to stop."""
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
    debug = run.config.debug
    folder = run.config.run_folder / "profile" if debug.profile and run.accelerator.is_main_process else None
    with profiling(folder) as step_done, torch.autograd.set_detect_anomaly(debug.detect_anomaly):
        training_loop(run, step_done)
    run.saver.finish()
    print_saver_messages(run)
    if not run.stopping:
        write_run_report(run)


def training_loop(run: Run, step_done: Callable[[], None]) -> None:
    """Trains, evaluates and saves. At the top of the loop `state.step` optimizer steps are done or launched.

    Args:
        step_done: called after each step.
    """
    first = run.state.step  # of a checkpoint, or 0: nothing to save yet
    while True:
        step = run.state.step
        last = step == run.config.max_steps
        saving = last or (step > 0 and step % run.config.checkpointing.save_steps == 0)
        due = run.due_evaluations(saving)
        try:
            if due:  # evaluations take longer than a step
                finish_last_step(run)
                run.agree_on_stopping()
            if (saving or run.stopping) and step > first:
                save(run)
            if run.stopping:
                break
            # The first checkpoint of a branch is another run's.
            saved = saving and (step > first or is_checkpoint(checkpoint_folder(run.checkpoints, step)))
            for evaluation in due:
                try:
                    metrics = evaluation.run(run)
                except EvaluationStopped:
                    break
                run.log_metrics(metrics, step)
                is_new = saved or step > first
                if is_new and run.state.update_best(metrics.get("val_loss", math.nan)) and not saved:
                    save(run)
                    saved = True
            if run.stopping and step > first and not saved:
                save(run)
            if (saving or saved) and run.accelerator.is_main_process:
                publish_and_prune(run)
            if last or run.stopping:
                break
            start_step(run)
            step_done()
        except Diverged as diverged:
            rollback(run, diverged)
            first = run.state.step
        except DataError as lost:
            if run.accelerator.num_processes == 1 and step > first:  # saving needs all ranks
                save_without_data(run)
            raise UserError(
                f"step {run.state.step}: {lost}; once the data can be read again, --resume_from_checkpoint continues "
                f"from the last checkpoint"
            ) from lost


def start_step(run: Run) -> None:
    """Launches one optimizer step, then reads the metrics of the step before it, which the device worked on."""
    accelerator, config, state = run.accelerator, run.config, run.state
    consumed = state.position * config.sequence_length
    batch_tokens = run.batch_plan.size(consumed)
    factor = run.schedule.at(state.step, consumed, batch_tokens)
    set_learning_rate(run.optimizer, factor)
    following = state.position + batch_tokens // config.sequence_length
    if is_skipped(state.skipped, state.position, following):
        finish_last_step(run)
        run.log.skipped(state.step, state.position, following)
        state.step, state.position = state.step + 1, following
        return

    run.timer.begin()
    started = time.perf_counter()
    micro_batches = run.prefetcher.take(state.position, following)
    waited = time.perf_counter() - started
    settings = config.optimizer
    results = training_step(
        accelerator, run.model, run.optimizer, micro_batches, settings.max_grad_norm, settings.z_loss
    )
    before = run.timer.launch(
        *gather_metrics(accelerator, results, waited, bool(run.stop)),
        step=state.step,
        batch=(state.position, following),
        tokens=consumed + batch_tokens,
        batch_tokens=batch_tokens,
        learning_rate=factor * settings.learning_rate,
    )
    if before is not None:
        finish_step(run, before)
    state.step, state.position = state.step + 1, following
    if accelerator.device.type == "cpu":  # nothing runs behind the host
        finish_last_step(run)
    print_saver_messages(run)


def finish_last_step(run: Run) -> None:
    """Reads and logs the metrics of the launched step, if there is one."""
    if (launched := run.timer.take()) is not None:
        finish_step(run, launched)


def finish_step(run: Run, launched: LaunchedStep) -> None:
    """Reads and logs the metrics of a step, and handles divergence. Only here does the host wait for the device."""
    metrics, stop = launched.finish()
    run.stopping |= stop
    metrics["mfu"] = run.flops_utilization(metrics["tokens_per_second"])
    if run.accelerator.is_main_process and (launched.step + 1) % run.config.logging.logging_steps == 0:
        metrics |= read_gpu(run.accelerator.device)
    run.log_metrics(metrics, launched.step)
    for message in run.uploads.poll(launched.step) if run.uploads is not None else ():
        run.log.print(message)
    handle_divergence(run, launched, metrics)


def save(run: Run) -> None:
    """Starts to write a checkpoint of the last step. Collective."""
    finish_last_step(run)
    run.log.flush()
    run.saver.wait()  # a second snapshot beside the first would need twice the memory
    snapshot = take_snapshot(run.accelerator, run.model, run.optimizer, run.state, run.tokenizer_files)
    if snapshot is not None:
        run.saver.save(snapshot)


def save_without_data(run: Run) -> None:
    """Saves the steps that are done, if they are not saved yet, after the data could not be read any more."""
    if not is_checkpoint(checkpoint_folder(run.checkpoints, run.state.step)):
        with contextlib.suppress(Diverged):  # a rollback would need data
            save(run)
    run.saver.finish()
    print_saver_messages(run)


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
    run_command(show_errors_in_launcher(main))
