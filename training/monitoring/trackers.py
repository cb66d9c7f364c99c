"""Trackers: one tracker run per run, continued by resumes and rollbacks, with each step once."""

import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from data_prep.common.command_line import UserError
from data_prep.common.files import write_text
from data_prep.common.hub import limit_waiting
from data_prep.common.schema import read_json, read_json_lines
from eval.reporting.records import MetricsLine, Sample
from training.settings.schema import TrainingConfig

PROJECT = "gpt-accelerate"  # of wandb, unless WANDB_PROJECT names another, and of trackio
_IDS = "trackers.json"  # in the run's folder: the ids of its run in wandb and in trackio


class _WandB(WandBTracker):
    """wandb cannot change steps that its server already has, so they are not logged again."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step is None or step >= self.run.starting_step:
            super().log(values, step=step, **kwargs)


def start_tracker(name: str, config: TrainingConfig, from_step: int) -> GeneralTracker:
    """Starts a tracker from `TRACKERS` for the steps from `from_step` on, with all earlier recorded steps once and no
    later ones, as far as it can forget them. First rank only."""
    file = config.run_folder / _IDS
    ids = read_json(file, dict[str, str]) if file.exists() else {}
    tracker, missing = TRACKERS[name](config, from_step, ids)
    write_text(file, json.dumps(ids) + "\n")
    for step, values in _recorded(config.run_folder, missing, from_step):
        tracker.log(values, step=step)
    return tracker


def _start_tensorboard(config: TrainingConfig, from_step: int, ids: dict[str, str]) -> tuple[GeneralTracker, int]:
    has_steps = any((config.run_folder / "tensorboard").glob("events.out.tfevents.*"))
    tracker = TensorBoardTracker("tensorboard", config.run_folder, purge_step=from_step if has_steps else None)
    tracker.start()
    # The settings as hyperparameters would be a run beside this one, another at each resume.
    lines = [f"    {name}: {value}" for name, value in config.to_dict().items()]
    tracker.writer.add_text("settings", "\n".join(lines), global_step=from_step)
    return tracker, from_step if has_steps else 0


def _start_wandb(config: TrainingConfig, from_step: int, ids: dict[str, str]) -> tuple[GeneralTracker, int]:
    """Starts wandb with its files in the run folder. Offline recordings are replaced, since a killed process may not
    have written all of them."""
    number = ids.setdefault("wandb", os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8])
    folder = Path(os.environ.get("WANDB_DIR") or config.run_folder)
    for recorded in folder.glob(f"wandb/offline-run-*-{number}"):
        shutil.rmtree(recorded)
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    tracker = _WandB(project, id=number, name=config.run_name, resume="allow", dir=str(folder))
    tracker.start()
    tracker.store_init_configuration({name: str(value) for name, value in config.to_dict().items()})
    return tracker, tracker.run.starting_step


def _start_trackio(config: TrainingConfig, from_step: int, ids: dict[str, str]) -> tuple[GeneralTracker, int]:
    """Starts trackio with its records in `RUN/trackio`, unless `TRACKIO_DIR` names another folder."""
    os.environ.setdefault("TRACKIO_DIR", str(config.run_folder / "trackio"))  # read when trackio is imported
    with suppress(UserError):  # then it cannot ask, and records as without a token
        limit_waiting()  # trackio asks the Hub whose token it is
    name, missing = _forget_in_trackio(from_step, ids.get("trackio")) or (config.run_name, 0)
    tracker = TrackioTracker(PROJECT, name=name, resume="allow" if missing else "never")
    tracker.start()
    tracker.store_init_configuration({name: str(value) for name, value in config.to_dict().items()})
    ids["trackio"] = tracker.run.id
    return tracker, missing


def _forget_in_trackio(from_step: int, run_id: str | None) -> tuple[str, int] | None:
    """Deletes a run's records from `from_step` on, or from its last step on if that is earlier: a process that was
    killed may not have written all of it. Returns its name, and the first step that is missing then; None if it has no
    records, or another run of its name would be continued."""
    from trackio.fragments import import_inbox_dir
    from trackio.sqlite_storage import SQLiteStorage

    import_inbox_dir()  # of a network file system, where trackio writes files first
    names: dict[Any, Any] = {record["id"]: record["name"] for record in SQLiteStorage.get_run_records(PROJECT)}
    latest = SQLiteStorage.get_latest_run_record_by_name(PROJECT, names.get(run_id) or "")
    if latest is None or latest["id"] != run_id:
        return None
    with closing(sqlite3.connect(SQLiteStorage.get_project_db_path(PROJECT), timeout=30)) as database, database:
        (last,) = database.execute("SELECT MAX(step) FROM metrics WHERE run_id = ?", (run_id,)).fetchone()
        missing = min(last, from_step)
        database.execute("DELETE FROM metrics WHERE run_id = ? AND step >= ?", (run_id, missing))
    if missing == 0:
        SQLiteStorage.delete_run(PROJECT, names[run_id], run_id=run_id)
    return names[run_id], missing


def _recorded(run_folder: Path, first: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Recorded steps from `first` to before `stop`, in the form that trackers receive."""
    steps: dict[int, dict[str, Any]] = {}
    if first < stop:
        for line in map(vars, read_json_lines(run_folder / "metrics.jsonl", MetricsLine)):
            names = [name for name, value in line.items() if isinstance(value, int | float | None) and name != "step"]
            steps.setdefault(line["step"], {}).update({name: line[name] for name in names})
        for sample in read_json_lines(run_folder / "samples.jsonl", Sample):
            values = steps.setdefault(sample.step, {})
            number = sum(name.startswith("sample/") for name in values)
            values[f"sample/{number}"] = sample.prompt + sample.text
    return ((step, steps[step]) for step in sorted(steps) if first <= step < stop)


TRACKERS = {"tensorboard": _start_tensorboard, "wandb": _start_wandb, "trackio": _start_trackio}
