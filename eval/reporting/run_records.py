"""The records of runs: our own, build-nanogpt's `log.txt` and llm.c's `main.log`."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from data_prep.common.command_line import UserError
from data_prep.common.files import read_text
from data_prep.common.records import CleaningStep
from data_prep.common.schema import STRICT, Count, Positive, read_json, read_json_lines, read_yaml, validate

# What the other trainers call our metrics. Their HellaSwag is that of the completion rule, by the mean loss.
_HELLASWAG = "hellaswag/completion/acc_norm"
_MOST = 1e300  # of a value that can be drawn
_BUILD_NANOGPT = {"train": "loss", "val": "val_loss", "hella": _HELLASWAG}
_LLM_C = {"trl": "loss", "tel": "val_loss", "eval": _HELLASWAG, "lr": "learning_rate", "norm": "grad_norm"}


@dataclass(frozen=True)
class DataRecord:
    """What `environment.json` says of a data folder.

    Attributes:
        prepared_by: the words of the command that made it, if that is known.
        share: in the training tokens of the run.
    """

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
    """The contents of `environment.json`: what a run was made with.

    Attributes:
        packages: their versions; None for one that is not installed.
        base_model: on the Hub, that the run began from.
    """

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
    """A line of `samples.jsonl`: a prompt, and how it was continued."""

    __pydantic_config__ = STRICT

    step: Count
    prompt: str
    text: str


@dataclass(frozen=True)
class MetricsLine:
    """A line of `metrics.jsonl`: a step, and whatever was measured there, by name."""

    __pydantic_config__ = STRICT | {"extra": "allow"}

    step: Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class _ReportedSettings:
    """Those settings of `config.yaml` that reports and cards do more with than show them."""

    __pydantic_config__ = STRICT | {"extra": "allow"}

    batch_tokens: Positive | None = None
    hellaswag_every: Count | None = None
    hellaswag_limit: Positive | None = None
    sample_prompts: list[str] = field(default_factory=list)
    init_from: str | None = None


class _ItemCounts(TypedDict):
    original: int
    effective: int


# What of the harness's results is read.
_HarnessFile = TypedDict(
    "_HarnessFile",
    {"results": dict[str, dict[str, Any]], "n-samples": NotRequired[dict[str, _ItemCounts]]},
)


@dataclass
class Curve:
    """A metric at the steps that it was measured at."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def at(self, step: float) -> float:
        """The value at a step, in between on a straight line."""
        return float(np.interp(step, self.steps, self.values))


@dataclass
class Record:
    """What a run has left behind.

    Attributes:
        curves: by the name of the metric.
        tokens_per_step: None where the log does not say.
        settings: of `config.yaml`; empty for logs of other trainers, as is `environment`.
        harness: scores of the lm-evaluation-harness by checkpoint, task and metric.
        harness_limits: how many items those are of, by checkpoint and task, where not of all.
    """

    name: str
    curves: dict[str, Curve]
    tokens_per_step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    environment: Environment | None = None
    samples: list[Sample] = field(default_factory=list)
    harness: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    harness_limits: dict[str, dict[str, int]] = field(default_factory=dict)

    def last(self, metric: str) -> float | None:
        """The last value of a metric, None where it was never measured."""
        return self.curves[metric].values[-1] if metric in self.curves else None

    def tokens(self) -> Curve | None:
        """Tokens of the run, by how many steps were done; None where the log does not say."""
        if "tokens" in self.curves and "batch_tokens" in self.curves:
            done, batch = self.curves["tokens"], self.curves["batch_tokens"]
            before = done.values[0] - batch.values[0]  # a run may have branched off from another
            return Curve([done.steps[0], *(step + 1 for step in done.steps)], [before, *done.values])
        if self.tokens_per_step is None:
            return None
        last = max(curve.steps[-1] for curve in self.curves.values())
        return Curve([0, last], [0.0, float(last * self.tokens_per_step)])

    def seconds(self) -> Curve | None:
        """Seconds of training without evaluations and checkpoints, by how many steps were done; None where the log does
        not say."""
        speed, tokens = self.curves.get("tokens_per_second"), self.tokens()
        if speed is None or tokens is None or min(speed.values) <= 0:
            return None
        took = [
            (tokens.at(step + 1) - tokens.at(step)) / value
            for step, value in zip(speed.steps, speed.values, strict=True)
        ]
        return Curve([speed.steps[0], *(step + 1 for step in speed.steps)], list(accumulate(took, initial=0.0)))


def read_run(path: Path, batch_tokens: int | None = None) -> Record:
    """The record of a run's folder, or of one log file.

    Args:
        batch_tokens: of a step, for a log that does not say.

    Raises:
        UserError: for a folder without a log, and a file that is not one.
    """
    if path.is_dir() and (path / "metrics.jsonl").exists():
        return _read_our_run(path)
    files = [path] if path.is_file() else [path / name for name in ("log.txt", "main.log") if (path / name).exists()]
    if not files:
        raise UserError(f"{path}: no run there, for want of a metrics.jsonl, log.txt or main.log")
    return Record("/".join(files[0].resolve().parts[-2:]), _read_log(files[0]), batch_tokens)


def _read_our_run(folder: Path) -> Record:
    config, environment, samples = (folder / name for name in ("config.yaml", "environment.json", "samples.jsonl"))
    settings = read_yaml(config) if config.exists() else {}
    validate(settings, _ReportedSettings, str(config))
    curves: dict[str, Curve] = {}
    for line in map(vars, read_json_lines(folder / "metrics.jsonl", MetricsLine)):
        for name, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                if not abs(value) < _MOST:
                    raise UserError(f"{folder / 'metrics.jsonl'}, step {line['step']}: {name} is beyond {_MOST:g}")
                curve = curves.setdefault(name, Curve())
                curve.steps.append(line["step"])
                curve.values.append(value)
    if not curves:
        raise UserError(f"{folder / 'metrics.jsonl'}: there is nothing in it yet")
    return Record(
        name=folder.resolve().name,
        curves=curves,
        tokens_per_step=settings.get("batch_tokens"),
        settings=settings,
        environment=read_json(environment, Environment) if environment.exists() else None,
        samples=read_json_lines(samples, Sample) if samples.exists() else [],
        harness=_harness_results(folder / "checkpoints", harness_scores),
        harness_limits=_harness_results(folder / "checkpoints", harness_limits),
    )


def _harness_results(checkpoints: Path, read: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `read` finds by task, for each checkpoint, in all results of the harness that lie beside it."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(checkpoints.glob("step_*.lm_eval*.json")):
        if re.fullmatch(r"step_\d{8}", name := path.name.partition(".")[0]):
            try:
                results = read_json(path, _HarnessFile)
            except UserError as error:  # one that is not whole must not keep a run from its report
                print(f"left out: {error}", file=sys.stderr)
                continue
            found.setdefault(name, {}).update(read(results))
    return found


def harness_limits(results: dict[str, Any]) -> dict[str, int]:
    """By task, how many items were evaluated, where that is not all."""
    counts = results.get("n-samples", {})
    return {task: count["effective"] for task, count in counts.items() if count["effective"] < count["original"]}


def harness_scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Scores by task and metric, without their errors, of what the lm-evaluation-harness returns or writes."""
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in scores.items()
            if isinstance(value, float) and "stderr" not in metric
        }
        for task, scores in results["results"].items()
    }


def _read_log(path: Path) -> dict[str, Curve]:
    """Lines of `STEP KIND VALUE` or of `s:STEP KIND:VALUE ...`; of a step that stands twice the later value holds."""
    values: dict[str, dict[int, float]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if pairs := re.fullmatch(r"s:(\d+)((?: \w+:\S+)+)\s*", line):
            step, found, names = pairs[1], dict(pair.split(":", 1) for pair in pairs[2].split()), _LLM_C
        elif words := re.fullmatch(r"(\d+) (\w+) (\S+)\s*", line):
            step, found, names = words[1], {words[2]: words[3]}, _BUILD_NANOGPT
        else:
            raise UserError(f"{path}, line {number}: neither build-nanogpt's nor llm.c's kind of log ({line[:60]!r})")
        for kind, value in found.items():
            try:
                values.setdefault(names.get(kind, kind), {})[int(step)] = float(value)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {value!r} is not a number") from error
    if not values:
        raise UserError(f"{path}: there is nothing in it")
    return {name: Curve(sorted(points), [points[s] for s in sorted(points)]) for name, points in values.items()}
