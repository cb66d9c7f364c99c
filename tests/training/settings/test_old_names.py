"""Settings under their names until version 0.2: in flags, in a file, and in a run that is resumed."""

import hashlib
import json
import shutil

import pytest
import yaml
from forks import begin

from training.settings.old_names import RENAMED
from training.settings.parsing import parse_config

OLD_FLAGS = "--micro_batch 4 --schedule wsd --val_every 7 --save_every 9 --keep_last 5 --optimizer muon --compile off"


def test_flags_give_the_same_configuration_and_one_line(capsys):
    old = parse_config([*OLD_FLAGS.split(), "--runs_dir", "a", "--run_name", "b", "--push_to_hub", "user/x"])
    line = capsys.readouterr().err
    new = OLD_FLAGS
    for name in ("micro_batch", "schedule", "val_every", "save_every", "keep_last", "optimizer", "compile"):
        assert f"{name} is now {RENAMED[name]}" in line
        new = new.replace(f"--{name} ", f"--{RENAMED[name]} ")
    assert line.count("\n") == 1 and "push_to_hub user/x is now push_to_hub with hub_model_id user/x" in line
    flags = ["--output_dir", "a/b", "--run_name", "b", "--push_to_hub", "--hub_model_id", "user/x"]
    assert parse_config([*new.split(), *flags]) == old
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("in_file", "flags", "folder", "name"),
    [
        ("runs_dir: a\nrun_name: b\n", [], "a/b", "b"),
        ("runs_dir: a\nrun_name: b\n", ["--run_name", "c"], "a/c", "c"),
        ("runs_dir: a\n", ["--output_dir", "x/y"], "x/y", "y"),
        ("output_dir: x/y\n", ["--run_name", "c"], "runs/c", "c"),
        ("run_name: b\n", [], "runs/b", "b"),
        ("", [], "runs/quickstart", "quickstart"),
    ],
)
def test_the_folder_of_a_run(tmp_path, in_file, flags, folder, name):
    (tmp_path / "a.yaml").write_text(in_file)
    config = parse_config([str(tmp_path / "a.yaml"), *flags])
    assert (str(config.run_folder), config.run_name) == (folder, name)


def test_an_old_run_is_resumed(tiny_run, tmp_path):
    """A run of 20 steps as version 0.2 wrote it, resumed from step 15: the same losses and weights."""
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000020")
    shutil.rmtree(folder / "report")
    old_names = {new: old for old, new in RENAMED.items()}

    def renamed(settings):
        return {old_names.get(name, name): value for name, value in settings.items()}

    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings |= {"runs_dir": "runs", "push_to_hub": None}
    (folder / "config.yaml").write_text(
        yaml.safe_dump(renamed({k: v for k, v in settings.items() if k != "output_dir"}))
    )
    checkpoint = folder / "checkpoints" / "step_00000015"
    state = checkpoint / "training_state" / "state.json"
    content = json.loads(state.read_text())
    content["settings"] = renamed(content["settings"])
    state.write_text(json.dumps(content))
    hashes = json.loads((checkpoint / "COMPLETE").read_text())
    hashes["training_state/state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    (checkpoint / "COMPLETE").write_text(json.dumps(hashes))

    resumed = begin(["--run_name", "tiny", "--resume"], tmp_path).finished("tiny")
    assert "micro_batch is now per_device_train_batch_size" in resumed.stdout
    assert resumed.losses() == tiny_run.losses()
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        assert (resumed.checkpoints[-1] / name).read_bytes() == (tiny_run.checkpoints[-1] / name).read_bytes()
