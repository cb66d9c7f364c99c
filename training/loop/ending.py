"""The end of a run: its report, and the last lines on screen."""

import shlex

from data_prep.common.command_line import first_line
from eval.report import PAGE_NAME
from training.checkpointing.storage import checkpoint_folder
from training.loop.run import Run


def write_run_report(run: Run) -> None:
    """Writes the report of the run."""
    run.log.close()
    if not run.accelerator.is_main_process:
        return
    from eval.report import write_report
    from eval.reporting.run_records import read_run

    try:
        write_report([read_run(run.config.run_folder)], run.config.report_folder)
    except Exception as error:  # the records were changed meanwhile; the run itself has succeeded
        print(f"no report: {first_line(error)}")


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
