"""Upload checkpoints of a run to the Hub, each with its model card: those that wait to be, or else the last.

python -m training.publish runs/mine
python -m training.publish runs/mine --push_to_hub USER/NAME --step 500

With --push_to_hub, training runs it by itself. What has failed is tried again by the same command.
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
from data_prep.common.files import write_text
from data_prep.common.hub import Hub, repository_problem
from data_prep.common.locks import locked
from data_prep.common.schema import STRICT, read_yaml, validate
from eval.reporting.card import model_card, until
from eval.reporting.plots import plot_all
from eval.reporting.run_records import Curve, read_run
from training.checkpointing.storage import checkpoint_folder, complete_checkpoints, damage, is_checkpoint, step_of
from training.publishing.queue import FOLDER, MARK, put, recover, taken, waiting

_LOCK_ATTEMPTS = 600  # a second each


@dataclass(frozen=True)
class Destination:
    """Where checkpoints go, and how.

    Attributes:
        repository: `USER/NAME`.
        strategy: as `hub_strategy` of the settings.
        revisions: tag each with its step.
        private: make the repository a private one, if it has to be made.
        licence: that the model card names.
    """

    repository: str
    strategy: str
    revisions: bool
    private: bool
    licence: str


def publish(run_folder: Path, to: Destination, steps: list[int]) -> None:
    """Upload the checkpoints of `steps`, or if there are none named, those that wait, or else the last one (under the
    strategy `best`: the best one) of the run.

    Raises:
        UserError: for whatever the user can mend. What has not been uploaded waits.
    """
    hub = Hub(to.repository, "model")
    with _outbox(run_folder):
        recover(run_folder)
        if not steps and not waiting(run_folder):
            _put_whole(_released_checkpoint(run_folder, to.strategy), run_folder)
        for step in steps:
            checkpoint = checkpoint_folder(run_folder / "checkpoints", step)
            if not is_checkpoint(checkpoint):
                raise UserError(f"step={step}: {checkpoint} is not there, or not complete")
            _put_whole(checkpoint, run_folder)
        chosen = _to_upload(run_folder, to.strategy, steps)
        hub.create(to.private)
        for checkpoint in chosen:
            step = step_of(checkpoint)
            with taken(checkpoint) as folder:
                _add_card(folder, step, run_folder, to)
                files = {path.name: path for path in sorted(folder.iterdir()) if path.name != MARK}
                url = hub.upload(files, f"Step {step}", tag=checkpoint.name if to.revisions else None)
            print(f"step {step:>6}  published {url}", flush=True)


def _put_whole(checkpoint: Path, run_folder: Path) -> None:
    if wrong := damage(checkpoint):
        raise UserError(f"{checkpoint} is damaged ({wrong}); it is not published")
    put(checkpoint, run_folder)


@contextlib.contextmanager
def _outbox(run_folder: Path) -> Iterator[None]:
    """Hold the outbox, once another process has let go of it: one that outlives its run is soon done."""
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
    """What waits to be uploaded, less what has been overtaken, which is removed."""
    found = waiting(run_folder)
    if steps:
        return [checkpoint for checkpoint in found if step_of(checkpoint) in steps]
    if strategy == "all":
        return found
    for overtaken in found[:-1]:
        shutil.rmtree(overtaken)
    return found[-1:]


def _released_checkpoint(run_folder: Path, strategy: str) -> Path:
    """The checkpoint that a finished run is known by: its last, or under the strategy `best` its best."""
    complete = complete_checkpoints(run_folder / "checkpoints")
    if not complete:
        raise UserError(f"{run_folder} has no complete checkpoint to publish")
    if strategy != "best":
        return complete[-1]
    losses = read_run(run_folder).curves.get("val_loss", Curve())
    by_step = dict(zip(losses.steps, losses.values, strict=True))
    return min(complete, key=lambda checkpoint: by_step.get(step_of(checkpoint), math.inf))


def _add_card(checkpoint: Path, step: int, run_folder: Path, to: Destination) -> None:
    """Write the model card, its pictures and the settings of the run beside a checkpoint that is to be uploaded."""
    record = read_run(run_folder)
    pictures = plot_all([until(record, step)], checkpoint)
    card = model_card(record, step, checkpoint, to.repository, to.licence, pictures)
    # Never through the links that the folder is made of.
    write_text(checkpoint / "README.md", card)
    # Whoever runs them has another place to publish to, or none.
    settings = {name: value for name, value in record.settings.items() if not name.startswith(("push_to_hub", "hub_"))}
    write_text(checkpoint / "training_config.yaml", redact(yaml.safe_dump(settings, sort_keys=False)))


def main() -> None:
    parser = ArgumentParser("python -m training.publish", __doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_option("push_to_hub", metavar="USER/NAME", help="repository; the run's if not given")
    parser.add_option("step", type=int, nargs="+", default=[], help="checkpoints to upload, by their steps")
    parser.add_option("hub_revisions", action="store_true", help="tag each with its step")
    parser.add_option("hub_private_repo", action="store_true", help="make the repository a private one")
    parser.add_option("hub_license", help="licence that the model card names; the run's, which is mit, if not given")
    parser.add_option("check", action="store_true", help="only see whether the Hub would take it")
    args = parser.parse_args()
    settings = _settings(args.run)
    repository = args.push_to_hub or settings.push_to_hub
    if repository is None:
        raise UserError(f"{args.run} has no push_to_hub; say where to: --push_to_hub USER/NAME")
    if problem := repository_problem("push_to_hub", repository):
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
    """Those settings of a run that say where its checkpoints go; the others are not read here."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}

    push_to_hub: str | None = None
    hub_strategy: Literal["end", "checkpoint", "best", "all"] = "checkpoint"
    hub_revisions: bool = False
    hub_private_repo: bool = False
    hub_license: str = "mit"


def _settings(run_folder: Path) -> _HubSettings:
    file = run_folder / "config.yaml"
    try:
        return validate(read_yaml(file), _HubSettings, str(file))
    except FileNotFoundError as error:
        raise UserError(f"{run_folder} is not the folder of a run (no config.yaml)") from error


if __name__ == "__main__":
    run(main)
