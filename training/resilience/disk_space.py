"""The room that the checkpoints of a run need."""

import shutil

from data_prep.common.command_line import UserError
from training.checkpointing.storage import complete_checkpoints
from training.settings.schema import TrainingConfig


def checkpoints_kept(config: TrainingConfig) -> int:
    """The most checkpoints that there will be at once: those to keep, the best, and the one that is being written."""
    run, steps = config.run, config.max_steps
    kept = run.keep_last + 2 + (steps // run.keep_every if run.keep_every else 0)
    return min(kept, -(-steps // run.save_every) + 1)


def room_for_checkpoints(config: TrainingConfig, checkpoint_bytes: int) -> tuple[int, int]:
    """Bytes that the checkpoints of a run will take, and bytes that they can have, those that are there included.

    Raises:
        UserError: where that is not enough.
    """
    kept = checkpoints_kept(config)
    needed = kept * checkpoint_bytes
    place = next(path for path in (config.run_folder, *config.run_folder.absolute().parents) if path.exists())
    ours = complete_checkpoints(config.checkpoints)
    there = sum(path.stat().st_size for folder in ours for path in folder.rglob("*") if path.is_file())
    room = shutil.disk_usage(place).free + there
    if needed > room:
        raise UserError(
            f"{kept} checkpoints of {gib(checkpoint_bytes)} take {gib(needed)}, and {place} has room for {gib(room)}; "
            f"make room, or keep fewer (keep_last={config.run.keep_last}, keep_every={config.run.keep_every})"
        )
    return needed, room


def gib(count: int) -> str:
    """A count of bytes, as in "1.39 GiB"."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
