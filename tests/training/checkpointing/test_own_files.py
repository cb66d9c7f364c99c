"""Files of a run that somebody, another version or a crash has changed: one line, or all is well."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_MODEL
from forks import begin

from data_prep.common.command_line import UserError
from training.settings.parsing import parse_config

pytestmark = pytest.mark.processes

MORE = ["--max_steps", "22", "--override", "max_steps"]
BOMB = 'a: &a ["x", "x", "x", "x", "x", "x", "x", "x", "x"]\n' + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run.folder, tmp_path / "runs" / "tiny")


@pytest.mark.parametrize("line", ["", "   ", "not json", '{"loss": 1}', "\0\0\0", '{"step": 3'])
def test_a_line_that_is_none_does_not_make_a_run_unresumable(run, tmp_path, line):
    for name in ("metrics.jsonl", "log.txt", "samples.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join([*lines[:3], line + "\n", *lines[3:]]))
    resumed = begin(["--run_name", "tiny", "--resume_from_checkpoint", *MORE], tmp_path).finished("tiny")
    assert len(resumed.losses()) == 22
    assert ("unreadable lines are skipped" in resumed.stdout) == bool(line.strip())


@pytest.mark.parametrize("changes_the_result", [False, True])
def test_a_setting_of_another_version_is_ignored_unless_it_changes_the_result(run, tmp_path, changes_the_result):
    config, checkpoint = run / "config.yaml", run / "checkpoints" / "step_00000020"
    config.write_text(config.read_text() + "rotary: true\n")
    if changes_the_result:
        file = checkpoint / "training_state" / "state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps(state | {"settings": state["settings"] | {"rotary": True}}))
        hashes = json.loads((checkpoint / "COMPLETE").read_text())
        hashes["training_state/state.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
        (checkpoint / "COMPLETE").write_text(json.dumps(hashes))
    code, text = begin(["--run_name", "tiny", "--resume_from_checkpoint", *MORE], tmp_path).ended()
    assert "config.yaml: ignored rotary=True, which this version does not have" in text, text
    assert code == (2 if changes_the_result else 0)
    assert ("give another result (rotary=True, now None)" in text) == changes_the_result


def test_a_wrong_value_in_the_file_of_a_run_is_one_line(run, tmp_path):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("n_layer: 2", "n_layer: two"))
    for words in (
        ["--run_name", "tiny", "--resume_from_checkpoint"],
        ["--resume_from_checkpoint", run / "checkpoints" / "step_00000020"],
    ):
        code, text = begin([*words, *MORE], tmp_path).ended()
        assert code == 2 and "config.yaml: n_layer='two' should be a valid integer" in text, text
        assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases (*name) are not read"),
        ("seed: 1\nseed: 2\n", "'seed' is there twice"),
        ("- a\n", "expected lines of `name: value`, found list"),
        ("1: 2\n", "expected lines of `name: value`"),
        ("[" * 100_000, "not a readable YAML file"),
        ("a: !!python/object/apply:os.system [ls]\n", "not a readable YAML file"),
        ("\x00", "not a readable YAML file"),
    ],
)
def test_a_file_of_settings_that_is_none_is_one_line(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse_config([str(file)])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_is_resumed_from_within_itself(run, data_folder, tmp_path):
    checkpoint = run / "checkpoints" / "step_00000020"
    words = ["--resume_from_checkpoint", ".", "--output_dir", tmp_path / "other" / "branch", *MORE]
    code, text = begin(words, checkpoint).ended()
    (checkpoint / "output_0").unlink()
    assert code == 0 and "from step 20" in text, text
    assert (tmp_path / "other" / "branch" / "checkpoints" / "step_00000022" / "COMPLETE").exists()


@pytest.mark.parametrize("weights", [["1e308", "1e308"], ["inf", "1"], ["nan", "1"], ["0", "1"], ["-1", "1"]])
def test_weights_without_a_sum_are_refused(data_folder, other_data, weights):
    from training.settings.validation import load_config

    words = ["--data", str(data_folder), str(other_data), "--data_weights", *weights, *TINY_MODEL]
    with pytest.raises(UserError, match="data_weights="):
        load_config(words, 1)


@pytest.mark.parametrize("name", ["COMPLETE", "config.json"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(run, tmp_path, name):
    import os

    file = run / "checkpoints" / "step_00000020" / name
    file.unlink()
    os.mkfifo(file)
    code, text = begin(["--run_name", "tiny", "--resume_from_checkpoint", *MORE], tmp_path).ended()
    assert "Traceback" not in text and code in (0, 2), text
    assert json.dumps(text)
