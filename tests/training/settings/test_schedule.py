"""Learning rate and batch against formulas written out from the papers."""

import math
from itertools import accumulate

import pytest

from modeling import PRESETS
from training.plot_schedule import corners, main
from training.settings.reading import parse_config
from training.settings.schedule import BatchPlan, Schedule

# Brown et al. 2020, table 2.1: batch size and learning rate; section 2.1's text has the smallest model's 0.5M.
GPT3 = {
    "gpt3-125m": (0.5e6, 6.0e-4),
    "gpt3-350m": (0.5e6, 3.0e-4),
    "gpt3-760m": (0.5e6, 2.5e-4),
    "gpt3-1.3b": (1e6, 2.0e-4),
    "gpt3-2.7b": (1e6, 1.6e-4),
    "gpt3-6.7b": (2e6, 1.2e-4),
    "gpt3-13b": (2e6, 1.0e-4),
    "gpt3-175b": (3.2e6, 0.6e-4),
}


def schedule(name, *, warmup=0, decay=0, cooldown=0, total=100, min_ratio=0.0, unit="steps"):
    return Schedule(name, unit, warmup, decay or total, cooldown, total, min_ratio)


def test_cosine_is_build_nanogpts():
    """Its `get_lr`, restated."""
    max_lr, min_lr, warmup, last = 6e-4, 6e-5, 715, 19073

    def expected(step):
        if step < warmup:
            return max_lr * (step + 1) / warmup
        if step > last:
            return min_lr
        ratio = (step - warmup) / (last - warmup)
        return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (max_lr - min_lr)

    ours = schedule("cosine", warmup=warmup, total=last, min_ratio=0.1)
    for step in [0, 1, 713, 714, 715, 716, 5000, 9894, 19072, 19073, 19074, 50000]:
        assert max_lr * ours.factor(step, 1) == pytest.approx(expected(step), rel=1e-12), step


@pytest.mark.parametrize("name", GPT3)
def test_gpt3s_own_schedule(name):
    """Appendix B: linear warmup over 375M tokens, cosine to 10% over 260B, constant to the end of 300B."""
    batch, peak = GPT3[name]
    lengths = ["--max_tokens", 300e9, "--warmup_tokens", 375e6, "--decay_tokens", 260e9]
    config = parse_config(["--preset", name, *(str(int(x)) if isinstance(x, float) else x for x in lengths)])
    plan, ours = config.batch_plan, config.schedule
    assert config.optimizer.learning_rate == peak and plan.batch_tokens == pytest.approx(batch, rel=0.05)
    assert config.sequence_length == 2048 and plan.tokens(config.max_steps) == pytest.approx(300e9, rel=1e-4)

    def rate(tokens):
        return config.optimizer.learning_rate * ours.at(-1, int(tokens), plan.size(int(tokens)))

    assert rate(0) == pytest.approx(peak * plan.batch_tokens / 375e6)
    assert rate(100e6) == pytest.approx(peak * (100e6 + plan.batch_tokens) / 375e6)
    assert rate(375e6) == pytest.approx(peak)
    for tokens in (1e9, 65e9, 130e9, 259e9):
        cosine = 0.5 * (1 + math.cos(math.pi * (tokens - 375e6) / (260e9 - 375e6)))
        assert rate(tokens) == pytest.approx(peak * (0.1 + 0.9 * cosine), rel=1e-9)
    assert rate(260e9) == rate(280e9) == rate(300e9) == pytest.approx(peak / 10)


def test_every_gpt3_preset_is_checked_here():
    assert {name for name in PRESETS if name.startswith("gpt3")} == set(GPT3)


def test_linear_constant_and_wsd():
    linear = schedule("linear", warmup=10, decay=60, min_ratio=0.2)
    assert [linear.factor(step, 1) for step in (0, 9, 10, 35, 60, 99)] == pytest.approx([0.1, 1, 1, 0.6, 0.2, 0.2])
    constant = schedule("constant", warmup=4)
    assert [constant.factor(step, 1) for step in (0, 3, 4, 99, 1000)] == pytest.approx([0.25, 1, 1, 1, 1])
    wsd = schedule("wsd", warmup=10, cooldown=20, min_ratio=0.1)
    assert [wsd.factor(step, 1) for step in (4, 10, 79, 80, 90, 99, 100)] == pytest.approx(
        [0.5, 1, 1, 1, 0.55, 0.145, 0.1]
    )
    trunk = schedule("wsd", warmup=10)
    assert trunk.factor(99, 1) == 1


def test_without_warmup_and_all_warmup():
    assert schedule("cosine").factor(0, 1) == 1
    assert schedule("cosine").factor(50, 1) == pytest.approx(0.5)
    assert schedule("cosine", warmup=100).factor(99, 1) == 1
    assert schedule("cosine", warmup=100).factor(100, 1) == 0


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_steps_and_tokens_are_the_same_for_a_constant_batch(name):
    lengths = {"warmup": 7, "cooldown": 30, "total": 100, "min_ratio": 0.1}
    steps = schedule(name, **lengths)
    batch = 4096
    tokens = schedule(name, **{k: v * batch if isinstance(v, int) else v for k, v in lengths.items()}, unit="tokens")
    for step in range(101):
        assert tokens.at(step, step * batch, batch) == pytest.approx(steps.at(step, step * batch, batch), rel=1e-12)


def test_ramp_is_gpt3s():
    """Appendix B: the batch grows linearly from 32k tokens to the full value over the first 4 to 12 billion."""
    full, start, length = 2**19, 2**15, 4_000_000_000
    plan = BatchPlan(full, start, length)
    assert plan.size(0) == start and plan.size(length) == plan.size(10 * length) == full
    for consumed in range(0, length, 12_345_678):
        exact = start + (full - start) * consumed / length
        assert exact - start < plan.size(consumed) <= exact and plan.size(consumed) % start == 0


@pytest.mark.parametrize("plan", [BatchPlan(96, 8, 1000), BatchPlan(96, 96, 0), BatchPlan(64, 32, 17)])
def test_steps_and_tokens_of_a_plan_are_those_counted_out(plan):
    consumed = [0]
    for _ in range(60):
        consumed.append(consumed[-1] + plan.size(consumed[-1]))
    assert [plan.tokens(steps) for steps in range(61)] == consumed
    assert consumed == [0, *accumulate(plan.size(c) for c in consumed[:-1])]
    for tokens in range(1, consumed[-1]):
        assert plan.steps(tokens) == next(steps for steps, total in enumerate(consumed) if total >= tokens)


def test_lengths_in_tokens_and_steps_may_be_mixed():
    flags = "--lr_scheduler_type wsd --batch_tokens 1024 --max_steps 100 --warmup_tokens 10240 --cooldown_steps 20"
    config = parse_config(flags.split())
    ours = config.schedule
    assert (ours.unit, ours.warmup, ours.total, ours.cooldown) == ("tokens", 10_240, 102_400, 20_480)
    config = parse_config(["--lr_scheduler_type", "wsd", "--batch_tokens", "1024", "--max_tokens", "102300"])
    assert config.max_steps == 100 and config.schedule.unit == "steps"
    flags = "--lr_scheduler_type wsd --batch_tokens 1024 --batch_ramp_start 256 --batch_ramp_tokens 4096"
    ramped = parse_config([*flags.split(), "--warmup_tokens", "500", "--max_steps", "40", "--cooldown_steps", "5"])
    assert ramped.schedule.cooldown == 5 * 1024 and ramped.schedule.total == ramped.batch_plan.tokens(40)
    cosine = ["--batch_tokens", "1024", "--decay_tokens", "40960"]
    ours = parse_config(cosine).schedule
    assert (ours.unit, ours.warmup, ours.decay) == ("tokens", 40 * 1024, 40_960)


def test_the_command_shows_the_corners(monkeypatch, capsys, tmp_path):
    words = ["--lr_scheduler_type", "wsd", "--cooldown_steps", "160", "--plot", str(tmp_path / "a.png")]
    monkeypatch.setattr("sys.argv", ["schedule", *words])
    main()
    shown = capsys.readouterr().out
    config = parse_config(words[:4])
    assert corners(config.batch_plan, config.schedule, config.max_steps) == [0, 40, 500, 840, 999]
    assert "2.000e-02" in shown and "1,000 steps, 2,048,000 tokens" in shown
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
