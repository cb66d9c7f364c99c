"""Everything once before a long run, and what it will take."""

import re
import signal
from functools import partial

import pytest
from conftest import TINY_MODEL
from forks import begin
from plants import signalled

from data_prep.common.command_line import UserError
from training.preflight import PreflightResult, checkpoints_kept, forecast, room_for_checkpoints
from training.settings.reading import parse_config


@pytest.fixture
def flags(data_folder) -> list[str]:
    words = "--batch_tokens 512 --mixed_precision no --preflight"
    return ["--data", str(data_folder), *TINY_MODEL, *words.split()]


def test_it_says_what_a_run_will_take_and_leaves_nothing(flags, swag_file, tmp_path):
    words = [*flags, "--hellaswag_every", "5", "--hellaswag_data", swag_file, "--full_determinism"]
    text = begin(words, tmp_path).ended_with(0)
    assert "preflight   every part works: steps, each evaluation, a checkpoint written and read" in text
    assert "parameters  45,728" in text and "steps       1,000: 512,000 tokens" in text
    hours, speed = re.search(r"time +([\d.]+) hours .* at ([\d,]+) tokens/s", text).groups()
    assert float(hours) == pytest.approx(512000 / float(speed.replace(",", "")) / 3600, abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["output_0"]


def test_a_model_that_cannot_be_made_leaves_nothing_either(flags, tmp_path):
    begin([*flags, "--attn_implementation", "flesh"], tmp_path).ended_with(2)
    assert [path.name for path in tmp_path.iterdir()] == ["output_0"]


def test_the_room_that_checkpoints_need(tmp_path):
    """Those to keep, the best, the one that is being written; never more than are made."""
    words = "--max_steps 1000 --save_steps 100 --save_total_limit 3"
    common = ["--output_dir", str(tmp_path / "run"), *words.split()]
    assert checkpoints_kept(parse_config(common)) == 5
    assert checkpoints_kept(parse_config([*common, "--keep_every", "500"])) == 7
    config = parse_config([*common, "--save_steps", "900", "--eval_steps", "900"])
    assert checkpoints_kept(config) == 3
    needed, room = room_for_checkpoints(config, 1000)
    assert needed == 3000 < room
    with pytest.raises(UserError, match=r"3 checkpoints of .* GiB take .* GiB, and .* has room for .* GiB; make room"):
        room_for_checkpoints(config, room)
    result = PreflightResult(2.0, 1024, 2**30, 2**31, 10**6, 0.5)
    config = parse_config([*common, "--max_steps", "800", "--batch_tokens", "1024"])
    assert "time        0.44 hours of training at 512 tokens/s\n" in forecast(config, result, 7, step=0, position=0)
    half_done = forecast(config, result, 7, step=400, position=400 * 1024 // config.sequence_length)
    assert "steps       400: 409,600 tokens\ntime        0.22 hours" in half_done


def test_it_ends_when_it_is_asked_to(flags, tmp_path):
    text = begin(flags, tmp_path, partial(signalled, "forward", 50, tmp_path, signal.SIGTERM)).ended_with(2)
    assert text.endswith("error: the preflight was stopped (SIGTERM)\n"), text
    assert [path.name for path in tmp_path.iterdir()] == ["output_0"]
