"""Settings under the names that they had until version 0.2, which are still read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

RENAMED = {
    "micro_batch": "per_device_train_batch_size",
    "schedule": "lr_scheduler_type",
    "optimizer": "optim",
    "init_from": "model_name_or_path",
    "val_every": "eval_steps",
    "save_every": "save_steps",
    "log_every": "logging_steps",
    "keep_last": "save_total_limit",
    "activation_checkpointing": "gradient_checkpointing",
    "compile": "torch_compile",
    "deterministic": "full_determinism",
    "resume": "resume_from_checkpoint",
    "runs_dir": "output_dir",
}


def new_name(name: str) -> str:
    """The name that a setting has now."""
    return RENAMED.get(name, name)


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """Settings under their new names. `runs_dir` stays, for `join_output_dir`."""
    translated = {name if name == "runs_dir" else new_name(name): value for name, value in values.items()}
    repository = translated.get("push_to_hub")
    if isinstance(repository, str) and (repository == "none" or "/" in repository):
        translated["push_to_hub"] = repository != "none"
        translated |= {"hub_model_id": repository} if repository != "none" else {}
    if isinstance(translated.get("override"), list):
        translated["override"] = [new_name(str(name)) for name in translated["override"]]
    return translated


def join_output_dir(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with `output_dir` in place of `runs_dir` and `run_name`."""
    values = dict(values)
    place = values.pop("runs_dir", None)
    if place is not None and "output_dir" not in values:
        values["output_dir"] = str(Path(str(place), str(values.get("run_name") or "quickstart")))
    return values


def notice(names: Iterable[str], values: dict[str, Any]) -> str | None:
    """One line that says the new names of those that are old; None if there are none."""
    said = [f"{name} is now {RENAMED[name]}" for name in names if name in RENAMED]
    said = [f"{line} (RUNS_DIR/RUN_NAME)" if line.startswith("runs_dir") else line for line in said]
    if isinstance(repository := values.get("push_to_hub"), str) and "/" in repository:
        said.append(f"push_to_hub {repository} is now push_to_hub with hub_model_id {repository}")
    return "; ".join(said) or None
