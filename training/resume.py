"""Which checkpoint a run goes on from, and whether it may."""

import json
from pathlib import Path
from typing import Any

from data_prep.cli import UserError
from training.checkpoint import COMPLETE, RunState, complete_checkpoints, load_state
from training.model import different_sizes
from training.settings import NEWEST, TrainingConfig


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint to go on from, None to start anew; a run that is there is never overwritten unasked.

    Raises:
        UserError: where there is none, or where the run has gone on beyond it.
    """
    complete = complete_checkpoints(config.checkpoints)
    if config.run.resume == NEWEST:
        if not complete:
            raise UserError(f"{config.run_folder} has no complete checkpoint to resume from; start without --resume")
        return complete[-1]
    chosen = None if config.run.resume is None else Path(config.run.resume)
    if chosen is not None and not (chosen / COMPLETE).exists():
        raise UserError(f"resume={str(chosen)!r} is not a complete checkpoint")
    if complete and (chosen is None or chosen.absolute() != complete[-1].absolute()):
        raise UserError(
            f"{config.run_folder} holds a run already (its last checkpoint is {complete[-1].name}); go on with it by "
            f"--resume, choose another --run_name, or remove that folder"
        )
    return chosen


def resumed_state(config: TrainingConfig, checkpoint: Path, data: dict[str, Any]) -> RunState:
    """The state saved in `checkpoint`, refused where the run would go on with another model or other data."""
    state = load_state(checkpoint)
    settings_file = checkpoint.parents[1] / "config.yaml"
    if different := different_sizes(config, json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))):
        raise UserError(
            f"{checkpoint} is another model ({'; '.join(different)}); resume with the settings in {settings_file}"
        )
    if different := [name for name in data if data[name] != state.data.get(name)]:
        raise UserError(
            f"{checkpoint} was trained on other data ({', '.join(different)}); resume with the data and the "
            f"settings in {settings_file}"
        )
    if state.step >= config.max_steps:
        raise UserError(f"{checkpoint} is at step {state.step} of max_steps={config.max_steps}; raise it")
    if checkpoint.parent.absolute() != config.checkpoints.absolute():
        state.best_step = state.best_val_loss = None  # that checkpoint is another run's
    return state
