"""Files of a run that somebody, another version or a crash has changed: one line, or all is well."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import TINY_MODEL
from forks import begin
from plants import rehash

from data_prep.common.command_line import UserError
from training.settings.reading import load_config, parse_config

pytestmark = pytest.mark.processes

MORE = ["--max_steps", "22", "--override", "max_steps"]
RESUME = ["--run_name", "tiny", "--resume_from_checkpoint", *MORE]
BOMB = 'a: &a ["x", "x", "x", "x", "x", "x", "x", "x", "x"]\n' + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run.folder, tmp_path / "runs" / "tiny")


@pytest.mark.parametrize("lines", [["", "   "], ["not json", '{"loss": 1}', "\0\0\0", '{"step": 3']])
def test_a_line_that_is_none_does_not_make_a_run_unresumable(run, tmp_path, lines):
    for name in ("metrics.jsonl", "log.txt", "samples.jsonl"):
        written = (run / name).read_text().splitlines()
        (run / name).write_text("\n".join([*written[:3], *lines, *written[3:], ""]))
    resumed = begin(RESUME, tmp_path).finished("tiny")
    assert len(resumed.losses()) == 22
    assert ("unreadable lines are skipped" in resumed.stdout) == any(line.strip() for line in lines)


@pytest.mark.parametrize("changes_the_result", [False, True])
def test_a_setting_of_another_version_is_ignored_unless_it_changes_the_result(run, tmp_path, changes_the_result):
    config, checkpoint = run / "config.yaml", run / "checkpoints" / "step_00000020"
    config.write_text(config.read_text() + "rotary: true\n")
    if changes_the_result:
        file = checkpoint / "training_state" / "state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps(state | {"settings": state["settings"] | {"rotary": True}}))
        rehash(checkpoint, "training_state/state.json")
    text = begin(RESUME, tmp_path).ended_with(2 if changes_the_result else 0)
    assert "config.yaml: ignored rotary=True, which this version does not have" in text, text
    assert ("give another result (rotary=True, now None)" in text) == changes_the_result


def test_a_wrong_value_in_the_file_of_a_run_is_one_line(run, tmp_path):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("n_layer: 2", "n_layer: two"))
    for words in (RESUME, ["--resume_from_checkpoint", run / "checkpoints" / "step_00000020", *MORE]):
        text = begin(words, tmp_path).ended_with(2)
        assert "config.yaml: n_layer='two' should be a valid integer" in text and text.count("\n") == 1, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases (*name) are not read"),
        ("seed: 1\nseed: 2\n", "'seed' is there twice"),
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
    assert "from step 20" in begin(words, checkpoint).ended_with(0)
    assert (tmp_path / "other" / "branch" / "checkpoints" / "step_00000022" / "COMPLETE").exists()


def test_weights_without_a_finite_sum_are_refused(data_folder, other_data):
    words = ["--data", str(data_folder), str(other_data), "--data_weights", "1e308", "1e308", *TINY_MODEL]
    with pytest.raises(UserError, match="data_weights="):
        load_config(words, 1)


@pytest.mark.parametrize("name", ["COMPLETE", "config.json"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(run, tmp_path, name):
    file = run / "checkpoints" / "step_00000020" / name
    file.unlink()
    os.mkfifo(file)
    code, text = begin(RESUME, tmp_path).ended()
    assert "Traceback" not in text and code in (0, 2), text
