"""Upload checkpoints of a run to the Hub, each with its model card: the queued ones, or else the last.

python -m training.publish runs/mine
python -m training.publish runs/mine --hub_model_id USER/NAME --step 500

Training with --push_to_hub runs this command by itself. After a failure, the same command tries again.
"""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml

from data_prep.common.command_line import ArgumentParser, UserError, redact, run
from data_prep.common.files import describe_path
from data_prep.common.hub import Hub, repository_problem
from data_prep.common.locks import locked
from data_prep.common.schema import Sha256, read_json, read_yaml, validate
from eval.reporting.card import model_card, truncate_to_step
from eval.reporting.plots import plot_all
from eval.reporting.records import Curve, read_run
from training.checkpointing.store import (
    COMPLETE,
    checkpoint_folder,
    complete_checkpoints,
    find_corruption,
    is_checkpoint,
    step_of,
)
from training.publishing import QUEUE, pending, queue_entry
from training.settings.schema import HubSettings


def publish(run_folder: Path, repository: str, settings: HubSettings, steps: list[int]) -> None:
    """Uploads the checkpoints of `steps`; without steps the queue; with an empty queue the last checkpoint of the run
    (with the strategy `best`: the best one).

    Raises:
        UserError: for everything that the user can correct. Checkpoints that are not uploaded stay in the queue.
    """
    hub = Hub(repository, "model")
    with locked(run_folder / QUEUE):  # one process at a time
        chosen = [checkpoint_folder(run_folder / "checkpoints", step) for step in steps]
        if missing := [checkpoint for checkpoint in chosen if not is_checkpoint(checkpoint)]:
            raise UserError(f"step={step_of(missing[0])}: {missing[0]} is not there, or not complete")
        outdated: list[Path] = []
        if not steps:
            chosen = pending(run_folder) or [_released_checkpoint(run_folder, settings.hub_strategy)]
            if settings.hub_strategy != "all":
                *outdated, newest = chosen
                chosen = [newest]
        hub.create(settings.hub_private_repo)
        for checkpoint in chosen:
            queued = _modified(queue_entry(checkpoint))
            if problem := find_corruption(checkpoint):
                raise UserError(f"{checkpoint} is damaged ({problem}); it is not published")
            written = {name: checkpoint / name for name in read_json(checkpoint / COMPLETE, dict[str, Sha256])}
            files = {name: path for name, path in written.items() if Path(name).name == name}  # no training state
            tag = checkpoint.name if settings.hub_revisions else None
            card = _card(checkpoint, run_folder, repository, settings.hub_license)
            url = hub.upload(files | card, f"Step {step_of(checkpoint)}", tag=tag)
            if queued is not None and queued == _modified(queue_entry(checkpoint)):  # else it has been saved again
                queue_entry(checkpoint).unlink()
            print(f"step {step_of(checkpoint):>6}  published {url}", flush=True)
        for checkpoint in outdated:
            queue_entry(checkpoint).unlink()


def _modified(entry: Path) -> int | None:
    return entry.lstat().st_mtime_ns if entry.exists() else None


def _released_checkpoint(run_folder: Path, strategy: str) -> Path:
    """The last checkpoint of a run, or with the strategy `best` its best."""
    complete = complete_checkpoints(run_folder / "checkpoints")
    if not complete:
        raise UserError(f"{run_folder} has no complete checkpoint to publish")
    if strategy != "best":
        return complete[-1]
    losses = read_run(run_folder).curves.get("val_loss", Curve())
    by_step = dict(zip(losses.steps, losses.values, strict=True))
    return min(complete, key=lambda checkpoint: by_step.get(step_of(checkpoint), math.inf))


def _card(checkpoint: Path, run_folder: Path, repository: str, licence: str) -> dict[str, bytes]:
    """The model card, its pictures and the settings of the run."""
    step, record = step_of(checkpoint), read_run(run_folder)
    with tempfile.TemporaryDirectory() as folder:
        pictures = plot_all([truncate_to_step(record, step)], Path(folder))
        card = model_card(record, step, checkpoint, repository, licence, pictures)
        files = {path.name: path.read_bytes() for path in pictures}
    # Not the repository: others who run these settings have their own.
    settings = {name: value for name, value in record.settings.items() if not name.startswith(("push_to_hub", "hub_"))}
    recipe = redact(yaml.safe_dump(settings, sort_keys=False))
    return files | {"README.md": card.encode(), "training_config.yaml": recipe.encode()}


def _settings(run_folder: Path) -> HubSettings:
    file = run_folder / "config.yaml"
    try:
        return validate(read_yaml(file), HubSettings, str(file))
    except FileNotFoundError as error:
        above = [folder for folder in run_folder.parents[:2] if (folder / "config.yaml").is_file()]
        kind = f"a part of {above[0]}; name that, and --step" if above else describe_path(run_folder)
        other = f"; it is {kind}" if kind else ""
        raise UserError(f"{run_folder} is not the folder of a run (no config.yaml){other}") from error


def main() -> None:
    parser = ArgumentParser("python -m training.publish", __doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_option("hub_model_id", metavar="USER/NAME", help="repository; the run's if not given")
    parser.add_option("step", type=int, nargs="+", default=[], help="checkpoints to upload, by their steps")
    parser.add_option("hub_revisions", action="store_true", help="tag each with its step")
    parser.add_option("hub_private_repo", action="store_true", help="make the repository a private one")
    parser.add_option("hub_license", help="licence that the model card names; the run's, which is mit, if not given")
    parser.add_option("check", action="store_true", help="only check whether the Hub would accept an upload")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if name.startswith("hub_") and value}
    settings = replace(_settings(args.run), **given)
    repository = settings.hub_model_id
    if repository is None:
        raise UserError(f"{args.run} has no hub_model_id; name the repository: --hub_model_id USER/NAME")
    if problem := repository_problem("hub_model_id", repository):
        raise UserError(problem)
    if args.check:
        Hub(repository, "model").check_access()
        print(f"{repository} can be written to")
    else:
        publish(args.run, repository, settings, args.step)


if __name__ == "__main__":
    run(main)
