"""The end of a run: its report, and the last lines on screen."""

import shlex
from pathlib import Path

from accelerate.tracking import GeneralTracker

from data_prep.common.command_line import first_line
from eval.report import PAGE_NAME
from eval.reporting.sections import CAPTIONS
from training.checkpointing.storage import checkpoint_folder
from training.loop.run import Run


def write_run_report(run: Run) -> None:
    """Writes the report of the run, and sends its pictures to the trackers."""
    run.log.close()
    if not run.accelerator.is_main_process:
        return
    from eval.report import write_report
    from eval.reporting.run_records import read_run

    try:
        folder = write_report([read_run(run.config.run_folder)], run.config.report_folder).parent
    except Exception as error:  # the records were changed meanwhile; the run itself has succeeded
        print(f"no report: {first_line(error)}")
        return
    pictures = [folder / name for name in CAPTIONS if (folder / name).exists()]
    for tracker in run.accelerator.trackers:
        try:
            _log_pictures(tracker, pictures, run.state.step)
        except Exception as error:  # each tracker has errors of its own
            print(f"{tracker.name} does not take the report's pictures: {type(error).__name__}: {first_line(error)}")


def _log_pictures(tracker: GeneralTracker, pictures: list[Path], step: int) -> None:
    """Sends pictures to a tracker that shows them, as `report/NAME`: `loss` is the name of a metric."""
    named = {f"report/{path.stem}": path for path in pictures}
    if tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(path) for name, path in named.items()}, step=step)
        return
    if not hasattr(tracker, "log_images"):
        return
    import numpy as np
    from PIL import Image

    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    for name, path in named.items():
        with Image.open(path) as image:
            tracker.log_images({name: np.array(image.convert("RGB"))[None]}, step=step, **options)


def print_ending(run: Run) -> None:
    """Prints where the run has ended, its results, and commands to try next."""
    if not run.accelerator.is_main_process:
        return
    folder, last = run.config.run_folder, checkpoint_folder(run.checkpoints, run.state.step)
    if run.stopping:
        remedy = (
            f"the same command with --resume_from_checkpoint continues from {last}"
            if last.exists()
            else "this run has no checkpoint yet"
        )
        print(f"\nstopped after step {run.state.step} ({run.stop_reason}); {remedy}")
        return
    repository = run.config.hub.hub_model_id
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
        f"best checkpoint  {_best_checkpoint(run)}\n"
        "\nNow try",
        *map(shlex.join, commands),
        sep="\n  ",
    )


def _best_checkpoint(run: Run) -> str:
    if run.state.best_step is None:
        return "none: no validation loss was finite"
    folder = checkpoint_folder(run.checkpoints, run.state.best_step)
    return f"{folder if folder.exists() else 'was not written'} (validation loss {run.state.best_val_loss:.4f})"
