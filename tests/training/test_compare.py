"""The comparison of settings: its plan, its statistics, and real runs."""

import math
import re

import pytest
from conftest import TINY_MODEL
from forks import begin_command

from data_prep.common.command_line import UserError
from eval.reporting.records import Curve, Record
from training.compare import turns
from training.comparison import Budget, Runs, make_variants, p_values, parse_budget, summary, time_to, verdict


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2m", Budget(2, "minutes")),
        ("0.5min", Budget(0.5, "minutes")),
        ("500k-tokens", Budget(500_000, "tokens")),
        ("1.5M tokens", Budget(1_500_000, "tokens")),
        ("800-steps", Budget(800, "steps")),
    ],
)
def test_budgets(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "2", "2h", "0m", "-2m", "m", "1e3-steps", "2m tokens", "nan-steps"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UserError, match="budget="):
        parse_budget(text)


def test_every_combination_is_a_variant(data_folder):
    fixed = [f"data={data_folder}", "warmup_steps=2"]
    variants = make_variants([], [*fixed, "optim=adamw,muon", "learning_rate=1e-3,3e-3"], Budget(5000, "tokens"))
    assert [variant.name for variant in variants] == [
        f"optim={optim},learning_rate={rate}" for optim in ("adamw", "muon") for rate in ("1e-3", "3e-3")
    ]
    assert {variant.max_steps for variant in variants} == {3}  # of 2,048 tokens
    settings = variants[-1].config().to_dict()
    assert (settings["optim"], settings["learning_rate"]) == ("muon", 3e-3)
    order = list(turns(variants, 2))
    assert [variant for variant, _ in order] == [*variants, *reversed(variants)]
    assert [seed for _, seed in order] == [1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("vary", "problem"),
    [
        (["optim"], "give NAME=VALUE,VALUE"),
        (["optim=adamw,"], "give NAME=VALUE,VALUE"),
        (["seed=1,2"], "the comparison itself sets seed"),
        (["optim=muon,muon"], "optim=muon: two variants have this name"),
        (["optim=sgd,muon"], "optim='sgd'"),
        (["learning_rate=1e-3,-1"], "learning_rate='-1'"),
        (["warmup_steps=11"], "warmup_steps=11 exceeds max_steps=10"),
        (["warmpu_steps=1"], "did you mean '--warmup_steps'"),
    ],
)
def test_problems_of_all_variants_come_before_anything_runs(vary, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        make_variants([], vary, Budget(10, "steps"))


def test_p_values():
    """Welch's t of 1, 2, 3 and 5, 7, 9 is 5 / sqrt(1/3 + 4/3) with 2.94 degrees of freedom; its tail is integrated
    here from Student's density."""
    first, other = [1.0, 2.0, 3.0], [5.0, 7.0, 9.0]
    t, degrees = 5 / math.sqrt(5 / 3), (5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    step = 1e-3
    inside = sum(
        step * scale * (1 + (step * (i + 0.5)) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(int(t / step))
    )
    assert p_values(first, [other]) == pytest.approx([1 - 2 * inside], abs=1e-3)
    # Benjamini and Hochberg: of two, the smaller is doubled, and the larger stays.
    alone = p_values(first, [other])[0]
    assert p_values(first, [other, first]) == pytest.approx([2 * alone, 1])
    assert p_values(first, [first, [1.0]]) == [1, None] and p_values([1.0], [[1.0]]) == [None]
    assert p_values([1.0, 1.0], [[2.0, 2.0]]) == [0]


def test_noise_is_not_told_apart():
    """Of 2,000 pairs of the same distribution, about 5% have a p below 0.05."""
    import numpy as np

    generator = np.random.default_rng(0)
    low = sum((p_values(*_pair(generator))[0] or 0) < 0.05 for _ in range(2000))
    assert 0.01 < low / 2000 < 0.07


def _pair(generator) -> tuple[list[float], list[list[float]]]:
    return generator.normal(size=3).tolist(), [generator.normal(size=3).tolist()]


def runs(*losses: float) -> Runs:
    return Runs("", [Record("", {"val_loss": Curve([10], [loss])}) for loss in losses], [])


def test_verdicts():
    first = runs(4.0, 4.1)
    assert verdict(first, runs(3.0, 3.1), 0.01) == "better"
    assert verdict(first, runs(5.0, 5.1), 0.01) == "worse"
    assert verdict(first, runs(5.0, 5.1), 0.06) == "not told apart"
    assert verdict(first, runs(5.0), None) == "one seed tells nothing"


def test_unequal_minutes_are_said():
    """Ten steps of a second, and ten of which each takes as many seconds as its variant says."""

    def timed(name: str, seconds: float) -> Runs:
        steps = list(range(1, 11))
        curves = {
            "val_loss": Curve([0, 10], [5.0, 4.0]),
            "val_bits_per_byte": Curve([0, 10], [2.0, 1.6]),
            "tokens": Curve(steps, [60.0 * step for step in steps]),
            "batch_tokens": Curve(steps, [60.0] * 10),
            "tokens_per_second": Curve(steps, [60 / seconds] * 10),
        }
        return Runs(name, [Record("", curves)] * 2, [])

    variants = [timed("first", 1), timed("near", 1.09), timed("far", 1.2)]
    assert summary(variants, Budget(1, "minutes")).count("its runs took") == 1
    assert "far: its runs took 0.20 minutes, not 0.17" in summary(variants, Budget(1, "minutes"))
    assert "its runs took" not in summary(variants, Budget(10, "steps"))


def test_time_to_a_loss():
    loss, minutes = Curve([0, 100, 200], [8.0, 6.0, 5.0]), Curve([0, 200], [0.0, 4.0])
    assert time_to(7.0, loss, minutes) == pytest.approx(1)
    assert time_to(5.0, loss, minutes) == pytest.approx(4)
    assert time_to(4.9, loss, minutes) is None


@pytest.mark.processes
def test_worse_is_called_worse_and_the_same_is_not_told_apart(data_folder, tmp_path):
    """Real runs: one seed, then two, of which one run fails at first; the same command then trains only that one."""
    base = f"data: {data_folder}\nwarmup_steps: 1\nbatch_tokens: 512\nval_tokens: 2048\n"
    base += "sample_every: 0\neval_steps: 5\n"
    base += "".join(f"{n[2:]}: {v}\n" for n, v in zip(TINY_MODEL[::2], TINY_MODEL[1::2], strict=True))
    for name, rate in {"base": 1e-2, "same": 1e-2, "worse": 1e-5}.items():
        (tmp_path / f"{name}.yaml").write_text(f"{base}learning_rate: {rate}\n")

    def compare(seeds: int, more: str = "", steps: int = 16) -> tuple[int, str]:
        words = f"base.yaml same.yaml worse.yaml --seeds {seeds} --budget {steps}-steps --output_dir out {more}"
        return begin_command("training.compare", words.split(), tmp_path).ended()

    code, text = compare(1)
    assert code == 0 and text.count("- worse: one seed tells nothing") == 1
    for other, problem in (
        (("", 17), "max_steps was 16, now 17"),
        (("--vary adam_beta1=0.8", 16), "adam_beta1 was 0.9"),
    ):
        code, text = compare(1, *other)
        assert code == 2 and f"out/base/seed_1 is of another comparison: {problem}" in text
    blocked = tmp_path / "out" / "same" / "seed_2"
    blocked.write_text("in the way of a run")
    code, text = compare(2)
    assert code == 2 and "same: seed_2 ended with code" in text and "runs of same failed" in text
    blocked.unlink()
    code, text = compare(2)
    assert code == 0 and text.count(" steps ...") == 1
    assert "- same: not told apart (p = 1)" in text and "- worse: worse than base (p = " in text
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert text.rstrip().splitlines()[-1] == "out/comparison.html"
    assert "data:image/png;base64," in (tmp_path / "out" / "comparison.html").read_text()
    assert report.count("| worse |") == 2 and (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
