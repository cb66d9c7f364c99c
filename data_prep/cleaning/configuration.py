"""Configuration of a cleaning: read from YAML, and checked completely before anything runs."""

import dataclasses
import importlib.util
import inspect
import pkgutil
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from data_prep.cleaning.decontamination import COMMON_DOCUMENTS
from data_prep.cleaning.evaluation_sets import SUFFIXES
from data_prep.common.command_line import UserError, raise_all, unknown_name
from data_prep.common.schema import STRICT, Count, Positive, find_problems, read_yaml, validate
from data_prep.reading.sources import CLEANING_REPORT, Source, names_files

INSTALL = 'pip install "gpt-accelerate[clean]"'
_FILTERS = {
    "gopher_repetition": "GopherRepetitionFilter",
    "gopher_quality": "GopherQualityFilter",
    "c4": "C4QualityFilter",
    "fineweb": "FineWebQualityFilter",
}
# Parameters of datatrove's filters and executors that are not settings of a step or of `executor_settings`.
_FILTER_ARGUMENTS = ("exclusion_writer", "language")
_EXECUTOR_ARGUMENTS = ("pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed")


@dataclass(frozen=True)
class MinLength:
    """Drops documents with fewer characters; the default is SlimPajama's."""

    __pydantic_config__ = STRICT

    characters: Positive = 200


@dataclass(frozen=True)
class ExactDedup:
    """Keeps one of the documents with the same text."""

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class MinHash:
    """Keeps one of the documents with nearly the same set of word n-grams; `jaccard` is the similarity of the pairs
    that are found with probability one half."""

    __pydantic_config__ = STRICT

    jaccard: Annotated[float, Field(ge=0.5, le=0.8)] = 0.7
    ngram: Positive = 5


@dataclass(frozen=True)
class QualityClassifier:
    """GPT-3's classifier; its training documents take about five bytes of memory for each byte of text."""

    __pydantic_config__ = STRICT

    curated: list[str]
    raw: list[str]
    documents: Positive = 100_000


@dataclass(frozen=True)
class Decontamination:
    """GPT-3's decontamination; `fields` as in `data_prep.cleaning.evaluation_sets.read_items`."""

    __pydantic_config__ = STRICT

    against: list[str]
    fields: list[str] | None = None
    common_documents: Positive = COMMON_DOCUMENTS


# In order of execution: fast ones first; duplicates before the classifier, so that it draws once for each text;
# evaluation sets last, so that no later step joins or changes texts. None: parameters of datatrove's filter.
STEPS: dict[str, type | None] = {
    "min_length": MinLength,
    **dict.fromkeys(_FILTERS),
    "exact_dedup": ExactDedup,
    "minhash": MinHash,
    "quality_classifier": QualityClassifier,
    "decontamination": Decontamination,
}


@dataclass(frozen=True)
class CleanConfig:
    """A cleaning; `data_prep/configs/clean.yaml` explains each setting. Once read, `steps` has the settings of those
    that run, each a dataclass of `STEPS` or parameters of datatrove's filter."""

    __pydantic_config__ = STRICT

    sources: dict[str, str] = field(default_factory=dict)
    output: str = ""
    steps: dict[str, Any] = field(default_factory=dict)
    text_column: str = "text"
    language: str = "eng"
    executor: Literal["local", "slurm", "ray"] = "local"
    executor_settings: dict[str, Any] = field(default_factory=dict)
    tasks: Positive = 1
    workers: Positive = 1
    seed: Count = 0

    def files(self) -> dict[str, list[Path]]:
        """Files of each source, sorted by name."""
        return {name: local_files(pattern) for name, pattern in self.sources.items()}

    def identity(self) -> dict[str, Any]:
        """All that determines the result: the settings except for the executor's, and names and sizes of the files."""
        execution = ("executor", "executor_settings", "workers")
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in execution}
        read = [path for paths in self.files().values() for path in paths]
        if quality := self.steps.get("quality_classifier"):
            read += [path for pattern in (*quality.curated, *quality.raw) for path in local_files(pattern)]
        read += map(Path, getattr(self.steps.get("decontamination"), "against", []))
        return {**fields, "bytes": {str(path): path.stat().st_size for path in read}}


def local_files(pattern: str) -> list[Path]:
    """Files of a pattern, sorted by name (`UserError` if there are none, or not local ones, which datatrove needs)."""
    if not names_files(pattern):
        raise UserError(f"source {pattern!r}: no such file or folder")
    corpus = Source(pattern).resolve()
    if corpus.filesystem is None or not corpus.is_local:
        raise UserError(f"source {pattern!r}: only local files are cleaned")
    return [Path(path) for path in corpus.paths]


def read_config(path: Path) -> CleanConfig:
    """Reads and checks a configuration (`UserError` with all problems)."""
    settings = read_yaml(path)
    if missing := [name for name in ("datatrove", "spacy", "sklearn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"cleaning needs {', '.join(missing)}, not installed here: {INSTALL}")
    found = find_problems(settings, CleanConfig, str(path))
    problems, wrong = [problem for _, problem in found], {name for name, _ in found}
    config = validate({name: settings[name] for name in settings if name not in wrong}, CleanConfig, str(path))
    config = dataclasses.replace(config, steps=_read_steps(config.steps, problems))
    if "executor" not in wrong:
        parameters = _parameters(executor_class(config.executor), _EXECUTOR_ARGUMENTS)
        _check(config.executor_settings, parameters, "executor_settings", problems)
    try:
        pkgutil.resolve_name("datatrove.utils.word_tokenizers:load_word_tokenizer")(config.language)
    except (ValueError, ImportError) as error:
        problems.append(f"language={config.language!r}: {' '.join(str(error).split())}")
    problems += _file_problems(config)
    raise_all(problems, "problems", f"{path}: ")
    return config


def _read_steps(given: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Steps that are switched on, in order of execution."""
    problems += [f"steps: {unknown_name(name, STEPS)}" for name in given if name not in STEPS]
    if all(value is None or value is False for value in given.values()):
        problems.append(f"steps: none is switched on; known: {', '.join(STEPS)}")
    steps = {}
    for name, kind in STEPS.items():
        settings = {} if (value := given.get(name)) is True else value
        if settings is None or settings is False:
            continue
        where = f"steps.{name}"
        if not isinstance(settings, dict):
            problems.append(f"{where}={settings!r}: true, false, or lines of `name: value`")
            continue
        schema: Any = kind or _parameters(filter_class(name), _FILTER_ARGUMENTS)
        if _check(settings, schema, where, problems):
            steps[name] = validate(settings, schema, where)
            if kind is None:
                steps[name] = {key: settings[key] for key in schema.model_fields if key in settings}
    return steps


def _check(settings: dict[str, Any], schema: Any, where: str, problems: list[str]) -> bool:
    found = find_problems(settings, schema, where)
    problems += [f"{where}: {problem}" for _, problem in found]
    return not found


def _parameters(kind: type, without: tuple[str, ...]) -> Any:
    """A pydantic model of the parameters of datatrove's class `kind`."""
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    fields: dict[str, Any] = {
        name: (_with_lists(hints.get(name, Any)), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in without
    }
    return create_model(kind.__name__, __config__=STRICT, **fields)


def _with_lists(hint: Any) -> Any:
    """A type hint with lists for tuples: datatrove annotates tuples of any length as `tuple[int]`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.Union[tuple(map(_with_lists, typing.get_args(hint)))]  # noqa: UP007
    return list if tuple in (hint, typing.get_origin(hint)) else hint


def filter_class(name: str) -> type:
    """datatrove's filter of a step."""
    return pkgutil.resolve_name(f"datatrove.pipeline.filters:{_FILTERS[name]}")


def executor_class(name: str) -> type:
    """datatrove's executor: `local`, `slurm` or `ray`."""
    return pkgutil.resolve_name(f"datatrove.executor.{name}:{name.capitalize()}PipelineExecutor")


def _file_problems(config: CleanConfig) -> list[str]:
    problems = [] if config.sources else ["sources: none is named"]
    problems += [] if config.output else ["output: no folder is named"]
    patterns = [(f"sources.{name}", pattern) for name, pattern in config.sources.items()]
    for name, (where, pattern) in zip(config.sources, patterns, strict=True):
        # The name becomes that of a folder beside cleaning.json and work/.
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name in ("work", CLEANING_REPORT):
            problems.append(f"{where}: a name is made of letters, digits, '_', '-' and '.', and is not 'work'")
        if config.output and Path(config.output).resolve().is_relative_to(Path(pattern).resolve()):
            problems.append(f"output={config.output!r} lies within {where}={pattern!r}; choose a folder beside it")
    quality = config.steps.get("quality_classifier")
    for kind in ("curated", "raw"):
        patterns += [(f"steps.quality_classifier.{kind}", pattern) for pattern in getattr(quality, kind, [])]
    for where, pattern in patterns:
        try:
            if not any(path.stat().st_size for path in local_files(pattern)):
                problems.append(f"{where}: {pattern!r}: there is nothing in it")
        except UserError as error:
            problems.append(f"{where}: {error}")
    for name in getattr(config.steps.get("decontamination"), "against", []):
        if not Path(name).is_file() or not name.endswith(SUFFIXES):
            suffixes = " or ".join(SUFFIXES)
            problems.append(f"steps.decontamination.against: {name!r} is not a file that ends in {suffixes}")
    return problems
