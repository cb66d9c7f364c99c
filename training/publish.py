"""Upload checkpoints of a run to the Hub, each with its model card: the queued ones, or else the last.

python -m training.publish runs/mine
python -m training.publish runs/mine --hub_model_id USER/NAME --step 500

Training with --push_to_hub runs this command by itself. After a failure, the same command tries again.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from data_prep.common.command_line import ArgumentParser, UserError, redact, run
from data_prep.common.files import describe_path, write_text
from data_prep.common.hub import Hub, repository_problem
from data_prep.common.locks import locked
from data_prep.common.schema import STRICT, read_yaml, validate
from eval.reporting.card import model_card, truncate_to_step
from eval.reporting.plots import plot_all
from eval.reporting.run_records import Curve, read_run
from training.checkpointing.storage import (
    checkpoint_folder,
    complete_checkpoints,
    find_corruption,
    is_checkpoint,
    step_of,
)
from training.publishing.queue import FOLDER, SENTINEL, claim, enqueue, pending, release_claims

_LOCK_ATTEMPTS = 600  # a second each


@dataclass(frozen=True)
class Destination:
    """The repository that checkpoints are uploaded to.

    Attributes:
        repository: `USER/NAME`.
        strategy: `hub_strategy` of the settings.
        revisions: tag each checkpoint with its step.
        private: make a new repository private.
        licence: in the model card.
    """

    repository: str
    strategy: str
    revisions: bool
    private: bool
    licence: str


def publish(run_folder: Path, to: Destination, steps: list[int]) -> None:
    """Uploads the checkpoints of `steps`; without steps the queue; with an empty queue the last checkpoint of the run
    (with the strategy `best`: the best one).

    Raises:
        UserError: for everything that the user can correct. Checkpoints that are not uploaded stay in the queue.
    """
    hub = Hub(to.repository, "model")
    with _locked_queue(run_folder):
        release_claims(run_folder)
        if not steps and not pending(run_folder):
            _enqueue_intact(_released_checkpoint(run_folder, to.strategy), run_folder)
        for step in steps:
            checkpoint = checkpoint_folder(run_folder / "checkpoints", step)
            if not is_checkpoint(checkpoint):
                raise UserError(f"step={step}: {checkpoint} is not there, or not complete")
            _enqueue_intact(checkpoint, run_folder)
        chosen = _to_upload(run_folder, to.strategy, steps)
        hub.create(to.private)
        for checkpoint in chosen:
            step = step_of(checkpoint)
            with claim(checkpoint) as folder:
                _add_card(folder, step, run_folder, to)
                files: dict[str, Path | bytes] = {
                    path.name: path for path in sorted(folder.iterdir()) if path.name != SENTINEL
                }
                url = hub.upload(files, f"Step {step}", tag=checkpoint.name if to.revisions else None)
            print(f"step {step:>6}  published {url}", flush=True)


def _enqueue_intact(checkpoint: Path, run_folder: Path) -> None:
    if problem := find_corruption(checkpoint):
        raise UserError(f"{checkpoint} is damaged ({problem}); it is not published")
    enqueue(checkpoint, run_folder)


@contextlib.contextmanager
def _locked_queue(run_folder: Path) -> Iterator[None]:
    """Locks the queue, after another process has released it: one that outlives its run ends soon."""
    for attempt in range(_LOCK_ATTEMPTS):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(run_folder / FOLDER))
            except UserError:
                if attempt + 1 == _LOCK_ATTEMPTS:
                    raise
                time.sleep(1)
                continue
            yield
            return


def _to_upload(run_folder: Path, strategy: str, steps: list[int]) -> list[Path]:
    """The queued checkpoints to upload; older ones that the strategy does not want are removed."""
    found = pending(run_folder)
    if steps:
        return [checkpoint for checkpoint in found if step_of(checkpoint) in steps]
    if strategy == "all":
        return found
    for outdated in found[:-1]:
        shutil.rmtree(outdated)
    return found[-1:]


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


def _add_card(checkpoint: Path, step: int, run_folder: Path, to: Destination) -> None:
    """Writes the model card, its pictures and the settings of the run into the folder to upload."""
    record = read_run(run_folder)
    pictures = plot_all([truncate_to_step(record, step)], checkpoint)
    card = model_card(record, step, checkpoint, to.repository, to.licence, pictures)
    # write_text replaces a link; it never writes through it.
    write_text(checkpoint / "README.md", card)
    # Not the repository: others who run these settings have their own.
    own = ("push_to_hub", "hub_")
    settings = {name: value for name, value in record.settings.items() if not name.startswith(own)}
    write_text(checkpoint / "training_config.yaml", redact(yaml.safe_dump(settings, sort_keys=False)))


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
    settings = _settings(args.run)
    repository = args.hub_model_id or settings.hub_model_id
    if repository is None:
        raise UserError(f"{args.run} has no hub_model_id; name the repository: --hub_model_id USER/NAME")
    if problem := repository_problem("hub_model_id", repository):
        raise UserError(problem)
    if args.check:
        Hub(repository, "model").check_access()
        print(f"{repository} can be written to")
        return
    to = Destination(
        repository=repository,
        strategy=settings.hub_strategy,
        revisions=args.hub_revisions or settings.hub_revisions,
        private=args.hub_private_repo or settings.hub_private_repo,
        licence=args.hub_license or settings.hub_license,
    )
    publish(args.run, to, args.step)


@dataclass(frozen=True)
class _HubSettings:
    """The settings of a run about its repository; the others are not read here."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}

    hub_model_id: str | None = None
    hub_strategy: Literal["end", "checkpoint", "best", "all"] = "checkpoint"
    hub_revisions: bool = False
    hub_private_repo: bool = False
    hub_license: str = "mit"


def _settings(run_folder: Path) -> _HubSettings:
    file = run_folder / "config.yaml"
    try:
        return validate(read_yaml(file), _HubSettings, str(file))
    except FileNotFoundError as error:
        above = [folder for folder in run_folder.parents[:2] if (folder / "config.yaml").is_file()]
        kind = f"a part of {above[0]}; name that, and --step" if above else describe_path(run_folder)
        other = f"; it is {kind}" if kind else ""
        raise UserError(f"{run_folder} is not the folder of a run (no config.yaml){other}") from error


if __name__ == "__main__":
    run(main)
