"""Records of runs (ours, and logs of build-nanogpt and llm.c), and published results of GPT-2 and GPT-3."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from data_prep.common.command_line import UserError
from data_prep.common.files import read_text
from data_prep.common.schema import STRICT, Count, Positive, read_json, read_json_lines, read_yaml
from data_prep.sources.source import CleaningStep

_LARGEST = 1e300  # value that can be plotted
# Our names of the metrics in other trainers' logs. Their HellaSwag follows the completion rule and divides by tokens.
_FOREIGN_NAMES = {"train": "loss", "trl": "loss", "val": "val_loss", "tel": "val_loss", "lr": "learning_rate",
                  "norm": "grad_norm", **dict.fromkeys(["hella", "eval"], "hellaswag/completion/acc_norm")}  # fmt: skip


@dataclass(frozen=True)
class DataRecord:
    """A data folder in `environment.json`, with the command that prepared it and its share of the training tokens."""

    __pydantic_config__ = STRICT

    folder: str
    source: str
    tokenizer: str
    training_tokens: Count
    share: float
    name: str | None = None
    revision: str | None = None
    prepared_by: list[str] = field(default_factory=list)
    cleaning: list[CleaningStep] | None = None


@dataclass(frozen=True)
class Environment:
    """The contents of `environment.json`; `packages` are versions by name, None if not installed."""

    __pydantic_config__ = STRICT

    command: list[str]
    python: str
    platform: str
    packages: dict[str, str | None]
    git_revision: str | None
    device: str
    num_processes: Positive
    distributed_type: str
    mixed_precision: str
    parameters: Count
    data: list[DataRecord]
    base_model: str | None = None
    flops_per_token: Count | None = None


@dataclass(frozen=True)
class Sample:
    """A line of `samples.jsonl`: a prompt and its continuation."""

    __pydantic_config__ = STRICT

    step: Count
    prompt: str
    text: str


@dataclass(frozen=True)
class MetricsLine:
    """A line of `metrics.jsonl`: a step, and metrics by name."""

    __pydantic_config__ = STRICT | {"extra": "allow"}

    step: Annotated[int, Field(ge=0, lt=2**63)]


class _ItemCounts(TypedDict):
    original: int
    effective: int


_HarnessResults = TypedDict(
    "_HarnessResults", {"results": dict[str, dict[str, Any]], "n-samples": NotRequired[dict[str, _ItemCounts]]}
)


@dataclass
class Curve:
    """Values of a metric at steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def at(self, steps: float | Sequence[float]) -> Any:
        """Returns the value at a step, or an array of those at several, by linear interpolation."""
        return np.interp(steps, self.steps, self.values)


@dataclass
class Record:
    """The logs of a run.

    Attributes:
        curves: by metric.
        settings: contents of `config.yaml`; empty for other trainers, whose `environment` is None.
        harness: scores of the lm-evaluation-harness by checkpoint, task and metric.
        harness_limits: number of evaluated items by checkpoint and task, None for all.
    """

    name: str
    curves: dict[str, Curve]
    settings: dict[str, Any] = field(default_factory=dict)
    environment: Environment | None = None
    samples: list[Sample] = field(default_factory=list)
    harness: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    harness_limits: dict[str, dict[str, int | None]] = field(default_factory=dict)

    @property
    def parameters(self) -> int | None:
        """The number of parameters, None if unknown."""
        return self.environment.parameters if self.environment else None

    def last(self, metric: str) -> float | None:
        """Returns the last value of a metric, None if there is none."""
        return self.curves[metric].values[-1] if metric in self.curves else None

    def tokens(self) -> Curve | None:
        """Returns the training tokens by number of finished steps, None if unknown."""
        if not {"tokens", "batch_tokens"} <= self.curves.keys():
            return None
        done, batch = self.curves["tokens"], self.curves["batch_tokens"]
        before = done.values[0] - batch.values[0]  # not 0 if the run branched off from another
        return Curve([done.steps[0], *(step + 1 for step in done.steps)], [before, *done.values])

    def seconds(self) -> Curve | None:
        """Returns the seconds of training, without evaluations and checkpoints, by number of finished steps, None if
        unknown."""
        speed, tokens = self.curves.get("tokens_per_second"), self.tokens()
        if speed is None or tokens is None or min(speed.values) <= 0:
            return None
        pairs = zip(speed.steps, speed.values, strict=True)
        took = [float(tokens.at(step + 1) - tokens.at(step)) / value for step, value in pairs]
        return Curve([speed.steps[0], *(step + 1 for step in speed.steps)], list(accumulate(took, initial=0.0)))


def read_run(path: Path, batch_tokens: int | None = None) -> Record:
    """Reads a run folder, or another trainer's log file with `batch_tokens` tokens per step. Raises `UserError` for a
    folder without a log, and for a file that is not a log."""
    if path.is_dir() and (path / "metrics.jsonl").exists():
        return _read_our_run(path)
    files = [path] if path.is_file() else [path / name for name in ("log.txt", "main.log") if (path / name).exists()]
    if not files:
        raise UserError(f"{path}: not a run folder or log (no metrics.jsonl, log.txt or main.log)")
    curves = _read_log(files[0])
    if batch_tokens and (loss := curves.get("loss")):
        curves["batch_tokens"] = Curve(loss.steps, [batch_tokens] * len(loss.steps))
        curves["tokens"] = Curve(loss.steps, [batch_tokens * (step + 1) for step in loss.steps])
    return Record("/".join(files[0].resolve().parts[-2:]), curves)


def _read_our_run(folder: Path) -> Record:
    config, environment, samples = (folder / name for name in ("config.yaml", "environment.json", "samples.jsonl"))
    curves: dict[str, Curve] = {}
    for line in map(vars, read_json_lines(folder / "metrics.jsonl", MetricsLine)):
        for name, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                if not abs(value) < _LARGEST:
                    raise UserError(f"{folder / 'metrics.jsonl'}, step {line['step']}: {name} is beyond {_LARGEST:g}")
                curve = curves.setdefault(name, Curve())
                curve.steps.append(line["step"])
                curve.values.append(value)
    if not curves:
        raise UserError(f"{folder / 'metrics.jsonl'}: there is nothing in it yet")
    record = Record(
        name=folder.resolve().name,
        curves=curves,
        settings=read_yaml(config) if config.exists() else {},
        environment=read_json(environment, Environment) if environment.exists() else None,
        samples=read_json_lines(samples, Sample) if samples.exists() else [],
    )
    for path in sorted((folder / "checkpoints").glob("step_*.lm_eval*.json")):
        if re.fullmatch(r"step_\d{8}", name := path.name.partition(".")[0]):
            try:
                results: dict[str, Any] = dict(read_json(path, _HarnessResults))
            except UserError as error:  # a damaged file must not prevent the report
                print(f"skipped: {error}", file=sys.stderr)
                continue
            record.harness.setdefault(name, {}).update(harness_scores(results))
            for task, n in results.get("n-samples", {}).items():
                limit = n["effective"] if n["effective"] < n["original"] else None
                record.harness_limits.setdefault(name, {})[task] = limit
    return record


def harness_scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Extracts scores keyed by task and metric, without standard errors, from results of the lm-evaluation-harness."""
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in scores.items()
            if isinstance(value, float) and "stderr" not in metric
        }
        for task, scores in results["results"].items()
    }


def _read_log(path: Path) -> dict[str, Curve]:
    """Reads lines `STEP KIND VALUE` or `s:STEP KIND:VALUE ...`; for a repeated step the last value counts."""
    values: dict[str, dict[int, float]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not (parts := re.fullmatch(r"(?:s:)?(\d+)((?: \w+[: ]\S+)+)\s*", line)):
            raise UserError(f"{path}, line {number}: not a line of build-nanogpt's or llm.c's logs ({line[:60]!r})")
        for kind, value in re.findall(r"(\w+)[: ](\S+)", parts[2]):
            try:
                values.setdefault(_FOREIGN_NAMES.get(kind, kind), {})[int(parts[1])] = float(value)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {value!r} is not a number") from error
    if not values:
        raise UserError(f"{path}: there is nothing in it")
    return {name: Curve(sorted(points), [points[s] for s in sorted(points)]) for name, points in values.items()}


_SAME_SIZE = 1.25  # largest ratio of parameters: GPT-2 has 124M and 1558M where GPT-3 has 125M and 1.3B

# Brown et al. 2020 (arXiv:2005.14165v4), table H.1, zero-shot, of the models Small, Med, Large and XL, by the harness's
# task and its nearest metric, in its units (eval/tasks/gpt3_zero_shot.yaml has the rules); only tasks on which such
# models beat chance. Compared with two copies of the paper's text on GitHub: standardgalactic/zetetics,
# 2005.14165.txt, and finnoh/ws_genai_eb, 2005.14165.md.
_GPT3_ZERO_SHOT = {
    ("hellaswag", "acc_norm"): (0.337, 0.436, 0.510, 0.547),
    ("lambada_openai", "acc"): (0.427, 0.543, 0.604, 0.636),
    ("lambada_openai", "perplexity"): (18.6, 9.09, 6.53, 5.44),
    ("triviaqa", "exact_match"): (0.0415, 0.0761, 0.140, 0.197),
    ("wsc273", "acc"): (0.663, 0.729, 0.747, 0.769),
    ("winogrande", "acc"): (0.520, 0.521, 0.574, 0.587),
    ("piqa", "acc_norm"): (0.646, 0.702, 0.729, 0.751),
    ("arc_challenge", "acc_mutual_info"): (0.266, 0.295, 0.318, 0.355),
    ("arc_easy", "acc_mutual_info"): (0.436, 0.465, 0.530, 0.538),
    ("openbookqa", "acc_mutual_info"): (0.356, 0.432, 0.452, 0.468),
    ("race", "acc_mutual_info"): (0.352, 0.379, 0.401, 0.409),  # RACE-h
    ("boolq", "acc"): (0.497, 0.603, 0.589, 0.624),
    ("copa", "acc_norm"): (0.660, 0.680, 0.730, 0.770),
    ("sglue_rte", "acc"): (0.477, 0.498, 0.484, 0.560),
}


@dataclass(frozen=True)
class ReferenceResult:
    """A published model and its scores; None if not published.

    Attributes:
        hellaswag_completion: acc_norm by the mean loss of a token. GPT-2: measured by build-nanogpt and llm.c.
        hellaswag_lm_eval: acc_norm of EleutherAI's harness.
        fineweb_edu_loss: in nats, on the validation shard of FineWeb-Edu's sample-10BT, measured by build-nanogpt.
        harness: scores by task and metric of EleutherAI's harness.

    build-nanogpt's own run of 40B tokens is that in its README, with the lowest loss and the highest accuracy.
    """

    name: str
    parameters: float
    hellaswag_completion: float
    hellaswag_lm_eval: float | None = None
    fineweb_edu_loss: float | None = None
    harness: Mapping[tuple[str, str], float] = field(default_factory=dict, hash=False)


def _gpt3(name: str, parameters: float, column: int) -> ReferenceResult:
    scores = {metric: values[column] for metric, values in _GPT3_ZERO_SHOT.items()}
    return ReferenceResult(name, parameters, scores["hellaswag", "acc_norm"], harness=scores)


REFERENCE_RESULTS = (
    ReferenceResult("GPT-2 124M", 124e6, 0.2955, 0.3114, 3.2924),
    ReferenceResult("GPT-2 350M", 355e6, 0.3752),
    ReferenceResult("GPT-2 774M", 774e6, 0.4320),
    ReferenceResult("GPT-2 1558M", 1558e6, 0.4889, 0.5089),
    ReferenceResult("build-nanogpt 124M", 124e6, 0.3337, None, 2.9478),
    _gpt3("GPT-3 125M", 125e6, 0),
    _gpt3("GPT-3 350M", 356e6, 1),
    _gpt3("GPT-3 760M", 760e6, 2),
    _gpt3("GPT-3 1.3B", 1.3e9, 3),
)


def of_the_same_size(parameters: float | None) -> list[ReferenceResult]:
    """Returns the published models with about this number of parameters."""
    sizes = REFERENCE_RESULTS if parameters else ()
    return [one for one in sizes if 1 / _SAME_SIZE < (parameters or 0) / one.parameters < _SAME_SIZE]
