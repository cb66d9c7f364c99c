"""The disk space that the checkpoints of a run need."""

import shutil

from data_prep.common.command_line import UserError
from training.checkpointing.storage import complete_checkpoints
from training.settings.config import TrainingConfig


def checkpoints_kept(config: TrainingConfig) -> int:
    """The most checkpoints that exist at one time: those to keep, the best, and the one that is being written."""
    kept, steps = config.checkpointing, config.max_steps
    count = kept.save_total_limit + 2 + (steps // kept.keep_every if kept.keep_every else 0)
    return min(count, steps // kept.save_steps + steps // config.evaluation.eval_steps + 1)


def room_for_checkpoints(config: TrainingConfig, checkpoint_bytes: int) -> tuple[int, int]:
    """Bytes that the checkpoints of a run will take, and bytes available to them, their present ones included.

    Raises:
        UserError: if the disk is too small.
    """
    count = checkpoints_kept(config)
    needed = count * checkpoint_bytes
    place = next(path for path in (config.run_folder, *config.run_folder.absolute().parents) if path.exists())
    ours = complete_checkpoints(config.checkpoints)
    present = sum(path.stat().st_size for folder in ours for path in folder.rglob("*") if path.is_file())
    room = shutil.disk_usage(place).free + present
    if needed > room:
        kept = config.checkpointing
        raise UserError(
            f"{count} checkpoints of {gib(checkpoint_bytes)} take {gib(needed)}, and {place} has room for {gib(room)}; "
            f"make room, or keep fewer (save_total_limit={kept.save_total_limit}, keep_every={kept.keep_every})"
        )
    return needed, room


def gib(count: int) -> str:
    """A number of bytes, as in "1.39 GiB"."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
