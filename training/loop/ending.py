"""The end of a run: its report, and what it says last."""

from data_prep.common.command_line import first_line
from eval.report import FILE_NAME
from eval.reporting.sections import CAPTIONS
from training.checkpointing.storage import checkpoint_folder
from training.loop.run import Run
from training.records.run_log import log_pictures


def report(run: Run) -> None:
    """Write the report of the run, and show its pictures in the trackers."""
    run.log.close()
    if not run.accelerator.is_main_process:
        return
    from eval.report import write_report
    from eval.reporting.run_records import read_run

    try:
        folder = write_report([read_run(run.config.run_folder)], run.config.report_folder).parent
    except Exception as error:  # records that were changed meanwhile: the run is none the worse for it
        print(f"no report: {first_line(error)}")
        return
    pictures = [folder / name for name in CAPTIONS if (folder / name).exists()]
    for tracker in run.accelerator.trackers if run.tracking else ():
        try:
            log_pictures(tracker, pictures, run.state.step)
        except Exception as error:  # the tracker's, of whatever kind
            print(f"{tracker.name} does not take the report's pictures: {type(error).__name__}: {first_line(error)}")


def _best(run: Run) -> str:
    if run.state.best_step is None:
        return "none: no validation loss was finite"
    folder = checkpoint_folder(run.checkpoints, run.state.best_step)
    return f"{folder if folder.exists() else 'was not written'} (validation loss {run.state.best_val_loss:.4f})"


def finish(run: Run) -> None:
    """Say what has become of the run, and what can be done with it."""
    if not run.accelerator.is_main_process:
        return
    folder, last = run.config.run_folder, checkpoint_folder(run.checkpoints, run.state.step)
    if run.stopping:
        why = run.stop.reason or "another process was asked to"
        goes_on = (
            f"the same command with --resume goes on from {last}" if last.exists() else "no step has been done yet"
        )
        print(f"\nstopped after step {run.state.step} ({why}); {goes_on}")
        return
    published = run.config.hub.push_to_hub
    report = run.config.report_folder / FILE_NAME
    publishing = f"python -m training.publish {folder} --push_to_hub USER/NAME"
    print(
        f"\nreport           {report if report.exists() else 'was not written'}\n"
        f"last checkpoint  {last}\n"
        f"best checkpoint  {_best(run)}\n"
        f"\nNow try\n"
        f"  python -m eval.generate {last} --prompt {run.config.run.sample_prompts[0]!r}\n"
        f"  python -m eval.loss {last} --data {run.data.names[0]}\n"
        f"  accelerate launch training/train.py {folder / 'config.yaml'} --run_name {folder.name}_longer "
        f"--max_steps {2 * run.config.max_steps}"
        + (f" --push_to_hub {published}_longer" if published else f"\n  {publishing}")
    )
