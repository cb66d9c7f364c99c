"""`config.yaml` and `environment.json` of a run."""

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from accelerate import Accelerator

from data_prep.common.command_line import redact
from data_prep.common.files import write_text
from data_prep.common.hub import is_on_hub
from data_prep.prepare import preparing_command
from training.engine.data import Data
from training.engine.distributed import describe_device
from training.settings.schema import START, TrainingConfig

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "tiktoken", "numpy", "safetensors", "gpt-accelerate")


def write_environment(
    config: TrainingConfig, accelerator: Accelerator, data: Data, parameters: int, flops_per_token: int
) -> None:
    """Writes the settings, and the versions, git revision, hardware and data, into the run's folder."""
    base_model = config.model.model_name_or_path
    settings = {name: value for name, value in config.to_dict().items() if name not in START}
    environment = {
        "command": list(map(redact, sys.argv)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_revision": git_revision(Path(__file__)),
        "device": describe_device(accelerator.device),
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "base_model": None if base_model is None or Path(base_model).exists() else base_model,  # on the Hub
        "parameters": parameters,
        "flops_per_token": flops_per_token,
        "data": [
            {
                "folder": name,
                "source": redact(manifest.source.source),
                "name": manifest.source.name,
                "revision": manifest.source.commit,
                "prepared_by": [] if is_on_hub(name) else list(map(redact, preparing_command(name, manifest))),
                "cleaning": [asdict(step) for step in manifest.cleaning],
                "tokenizer": manifest.tokenizer.name,
                "training_tokens": manifest.tokens("train"),
                "share": share,
            }
            for name, manifest, share in zip(data.names, data.manifests, data.shares, strict=True)
        ],
    }
    write_text(config.run_folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    write_text(config.run_folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision(file: Path) -> str | None:
    """The commit of the repository that tracks `file`, with "+" if files differ from it; None if none does."""

    def git(*arguments: str | Path) -> str:
        return subprocess.run(["git", *arguments], cwd=file.parent, capture_output=True, text=True).stdout

    try:
        if not git("ls-files", file.name):  # installed into the environment of another repository
            return None
        return git("describe", "--always", "--abbrev=40", "--dirty=+").strip() or None
    except OSError:
        return None
