"""Starts the trackers of a run: each step is recorded once, however often the run is resumed or rolled back."""

import contextlib
import json
import os
import secrets
import sqlite3
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, WandBTracker

from data_prep.common.command_line import UserError
from data_prep.common.files import read_text, write_text
from data_prep.common.hub import limit_waiting
from training.records.run_log import RunLog
from training.settings.config import TrainingConfig

_WANDB_ID = "wandb_id"  # file in the run's folder


def start_trackers(config: TrainingConfig, accelerator: Accelerator, log: RunLog, step: int) -> None:
    """Starts the trackers of `report_to` with the settings of the run, from `step` on, the run's own log before them.
    Collective.

    trackio writes to `RUN/trackio`, unless the user's `TRACKIO_DIR` names another folder, wandb to `RUN/wandb`.
    """
    accelerator.trackers = []
    if config.logging.report_to != "none":
        os.environ.setdefault("TRACKIO_DIR", str(config.run_folder / "trackio"))  # read when trackio is imported
        names = list(map(str, accelerator.log_with))
        if "trackio" in names:
            with contextlib.suppress(UserError):  # then it cannot ask, and records as without a token
                limit_waiting()  # trackio asks the Hub whose token it is
        if "wandb" in names:
            accelerator.log_with[names.index("wandb")] = _wandb(config, accelerator)
        options = {"trackio": {"name": config.run_name, "resume": "allow"}, "tensorboard": {"purge_step": step}}
        lacking = _truncate_trackio(config, step) if "trackio" in names and accelerator.is_main_process else step
        accelerator.init_trackers(config.run_name, init_kwargs=options)
        for tracker in accelerator.trackers if accelerator.is_main_process else ():
            _record_start(tracker, config, log, lacking if tracker.name == "trackio" else step)
    accelerator.trackers = [log, *accelerator.trackers]


def restart_trackers(config: TrainingConfig, accelerator: Accelerator, log: RunLog, step: int) -> None:
    """Starts the trackers again after a rollback to `step`. Collective."""
    for tracker in accelerator.trackers:
        if tracker is not log:
            tracker.finish()
    start_trackers(config, accelerator, log, step)


def _record_start(tracker: GeneralTracker, config: TrainingConfig, log: RunLog, lacking: int) -> None:
    """Records the settings of the run, and the steps from `lacking` on that its own log has."""
    settings = {name: str(value) for name, value in config.to_dict().items()}
    if tracker.name == "tensorboard":  # its hyperparameters would make another run for each start
        tracker.tracker.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```", 0)
    else:
        tracker.store_init_configuration(settings)
    for step, metrics in log.recorded(lacking).items():
        tracker.log(metrics, step=step)


def _wandb(config: TrainingConfig, accelerator: Accelerator) -> WandBTracker:
    """wandb's tracker of this run, whose id is kept in the run's folder."""
    file = config.run_folder / _WANDB_ID
    if accelerator.is_main_process and not file.exists():
        write_text(file, f"{os.environ.get('WANDB_RUN_ID', secrets.token_hex(4))}\n")
    accelerator.wait_for_everyone()
    project, folder = os.environ.get("WANDB_PROJECT", "gpt-accelerate"), os.environ.get("WANDB_DIR", config.run_folder)
    run = {"id": read_text(file).strip(), "name": config.run_name, "resume": "allow"}
    return WandBTracker(project, dir=str(folder), **run)


def _truncate_trackio(config: TrainingConfig, step: int) -> int:
    """Removes what trackio has from `step` on, or from its last step, which may be incomplete: it writes in the
    background, and what waits is lost when the run is killed. Returns the first step that it lacks."""
    file = Path(os.environ["TRACKIO_DIR"], f"{config.run_name}.db")
    if not file.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        ((last,),) = database.execute("SELECT MAX(step) FROM metrics WHERE run_name = ?", (config.run_name,))
        lacking = min(step, last or 0)
        database.execute("DELETE FROM metrics WHERE run_name = ? AND step >= ?", (config.run_name, lacking))
    return lacking
