"""The configuration of a cleaning: read from YAML, and checked as a whole before anything runs."""

import dataclasses
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.cleaning.check_settings import checked, parameters
from data_prep.cleaning.decontamination import COMMON_DOCUMENTS
from data_prep.cleaning.evaluation_sets import SUFFIXES
from data_prep.common.command_line import UserError, unknown_name
from data_prep.common.schema import read_yaml
from data_prep.reading.sources import CLEANING_REPORT, Source, names_files

INSTALL = 'pip install "gpt-accelerate[clean]"'
EXECUTORS = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
FILTERS = {
    "gopher_repetition": "GopherRepetitionFilter",
    "gopher_quality": "GopherQualityFilter",
    "c4": "C4QualityFilter",
    "fineweb": "FineWebQualityFilter",
}


@dataclass(frozen=True)
class MinLength:
    """Shorter documents are dropped; SlimPajama's bound is 200."""

    characters: int = 200


@dataclass(frozen=True)
class ExactDedup:
    """Of documents with the same text one is kept."""


@dataclass(frozen=True)
class MinHash:
    """Of documents whose sets of word n-grams are near-duplicates one is kept.

    Attributes:
        jaccard: the similarity at which a pair is found with even odds, 0.5 to 0.8.
        ngram: words in an n-gram.
    """

    jaccard: float = 0.7
    ngram: int = 5


@dataclass(frozen=True)
class QualityClassifier:
    """GPT-3's classifier.

    Attributes:
        curated, raw: files, folders or patterns of the documents that it learns to tell apart.
        documents: about so many of each kind, the first ones of every file; they are held in memory, at about five
            bytes for each byte of text.
    """

    curated: list[str]
    raw: list[str]
    documents: int = 100_000


@dataclass(frozen=True)
class Decontamination:
    """GPT-3's decontamination.

    Attributes:
        against: the evaluation sets, .jsonl or .txt.
        fields: of a record that make up an item; None as in `data_prep.cleaning.evaluation_sets.read_items`.
        common_documents: n-grams in more documents than these are left alone.
    """

    against: list[str]
    fields: list[str] | None = None
    common_documents: int = COMMON_DOCUMENTS


# In the order that they run in: what is cheap first; duplicates before the classifier, so that it draws once for each
# text; evaluation sets last, so that nothing after it joins or changes texts.
STEPS: dict[str, type | None] = {
    "min_length": MinLength,
    **dict.fromkeys(FILTERS),
    "exact_dedup": ExactDedup,
    "minhash": MinHash,
    "quality_classifier": QualityClassifier,
    "decontamination": Decontamination,
}


@dataclass(frozen=True)
class CleanConfig:
    """A cleaning. The steps of `data_prep/configs/clean.yaml` explain each setting.

    Attributes:
        sources: a name for each file, folder or pattern of raw documents.
        output: the folder to make.
        steps: the settings of each step that runs, by its name in `STEPS`.
        text_column: the field of a record that holds its text.
        language: of datatrove's filters, as in `eng`.
        executor: `local`, `slurm` or `ray`.
        executor_settings: what datatrove's executor of that kind takes beyond tasks and workers.
        tasks: how many parts the documents are dealt into, by file; part of the result.
        workers: how many tasks run at a time.
        seed: of MinHash and of the quality classifier's draws.
    """

    sources: dict[str, str] = field(default_factory=dict)
    output: str = ""
    steps: dict[str, Any] = field(default_factory=dict)
    text_column: str = "text"
    language: str = "eng"
    executor: str = "local"
    executor_settings: dict[str, Any] = field(default_factory=dict)
    tasks: int = 1
    workers: int = 1
    seed: int = 0

    def files(self) -> dict[str, list[Path]]:
        """The files of each source, in the order of their names."""
        return {name: local_files(pattern) for name, pattern in self.sources.items()}

    def identity(self) -> dict[str, Any]:
        """All that decides the result: the settings but for those of the executor, and the names and sizes of the
        files that are read."""
        fields = dataclasses.asdict(self)
        for name in ("executor", "executor_settings", "workers"):
            del fields[name]
        read = [path for paths in self.files().values() for path in paths]
        if quality := self.steps.get("quality_classifier"):
            read += [path for pattern in (*quality.curated, *quality.raw) for path in local_files(pattern)]
        read += map(Path, getattr(self.steps.get("decontamination"), "against", []))
        return {**fields, "bytes": {str(path): path.stat().st_size for path in read}}


def local_files(pattern: str) -> list[Path]:
    """The files that a pattern stands for, in the order of their names.

    Raises:
        UserError: where there are none, and for what is not local: datatrove's tasks read files, not streams.
    """
    if not names_files(pattern):
        raise UserError(f"source {pattern!r}: no such file or folder")
    corpus = Source(pattern).resolve()
    if corpus.filesystem is None or not corpus.is_local:
        raise UserError(f"source {pattern!r}: only local files are cleaned")
    return [Path(path) for path in corpus.paths]


def read_config(path: Path) -> CleanConfig:
    """Read and check a configuration.

    Raises:
        UserError: with all that is wrong with it.
    """
    settings = read_yaml(path)
    require_libraries()
    problems: list[str] = []
    config = CleanConfig(**checked(parameters(CleanConfig), settings, "", problems))
    config = dataclasses.replace(config, steps=_steps(config, problems))
    problems += _out_of_range(config) + _bad_files(config)
    if problems:
        listed = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"{path}: {listed}")
    return config


def require_libraries() -> None:
    """Check that what cleaning needs is installed.

    Raises:
        UserError: naming what is not.
    """
    if missing := [name for name in ("datatrove", "spacy", "sklearn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"cleaning needs {', '.join(missing)}, not installed here: {INSTALL}")


def _steps(config: CleanConfig, problems: list[str]) -> dict[str, Any]:
    problems += [f"steps: {unknown_name(str(name), STEPS)}" for name in config.steps if name not in STEPS]
    steps = {}
    for name, kind in STEPS.items():
        settings = config.steps.get(name, False)
        if settings is False or settings is None:
            continue
        settings = {} if settings is True else settings
        if not isinstance(settings, dict):
            problems.append(f"steps.{name}={settings!r}: true, false, or lines of `name: value`")
        elif kind is not None:
            before = len(problems)
            good = checked(parameters(kind), settings, f"steps.{name}", problems)
            if len(problems) == before:
                steps[name] = kind(**good)
        else:
            known = parameters(filter_class(name), {"exclusion_writer", "language"})
            steps[name] = checked(known, settings, f"steps.{name}", problems)
    return steps


def filter_class(name: str) -> type:
    """datatrove's filter of a step in `FILTERS`."""
    from datatrove.pipeline import filters

    return getattr(filters, FILTERS[name])


def executor_class(name: str) -> type:
    """datatrove's executor of a name in `EXECUTORS`."""
    return getattr(importlib.import_module(f"datatrove.executor.{name}"), EXECUTORS[name])


def _out_of_range(config: CleanConfig) -> list[str]:
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    problems = [
        f"{name}={value}: should be at least {least}"
        for name, value, least in [("tasks", config.tasks, 1), ("workers", config.workers, 1), ("seed", config.seed, 0)]
        if value < least
    ]
    if config.executor not in EXECUTORS:
        problems.append(f"executor: {unknown_name(config.executor, EXECUTORS)}; known: {', '.join(EXECUTORS)}")
    else:
        ours = {"pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed"}
        known = parameters(executor_class(config.executor), ours)
        checked(known, config.executor_settings, "executor_settings", problems)
    try:
        load_word_tokenizer(config.language)
    except (ValueError, ImportError) as error:
        problems.append(f"language={config.language!r}: {' '.join(str(error).split())}")
    if not config.steps:
        problems.append(f"steps: none is switched on; known: {', '.join(STEPS)}")
    bounds = [("min_length", "characters", 1, None), ("minhash", "jaccard", 0.5, 0.8), ("minhash", "ngram", 1, None)]
    bounds.append(("quality_classifier", "documents", 1, None))
    for step, name, least, most in [*bounds, ("decontamination", "common_documents", 1, None)]:
        value = getattr(config.steps.get(step), name, least)
        if value < least or (most is not None and value > most):
            bound = f"at least {least}" if most is None else f"between {least} and {most}"
            problems.append(f"steps.{step}.{name}={value}: should be {bound}")
    return problems


def _bad_files(config: CleanConfig) -> list[str]:
    problems = [] if config.sources else ["sources: none is named"]
    problems += [] if config.output else ["output: no folder is named"]
    for name in config.sources:
        # The name becomes that of a folder beside cleaning.json and work/.
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name in ("work", CLEANING_REPORT):
            problems.append(f"sources.{name}: a name is made of letters, digits, '_', '-' and '.', and is not 'work'")
    patterns = [(f"sources.{name}", pattern) for name, pattern in config.sources.items()]
    for where, pattern in patterns:
        if config.output and Path(config.output).resolve().is_relative_to(Path(pattern).resolve()):
            problems.append(f"output={config.output!r} lies within {where}={pattern!r}; choose a folder beside it")
    if quality := config.steps.get("quality_classifier"):
        for kind in ("curated", "raw"):
            patterns += [(f"steps.quality_classifier.{kind}", pattern) for pattern in getattr(quality, kind)]
    for where, pattern in patterns:
        try:
            if not any(path.stat().st_size for path in local_files(pattern)):
                problems.append(f"{where}: {pattern!r}: there is nothing in it")
        except UserError as error:
            problems.append(f"{where}: {error}")
    for name in getattr(config.steps.get("decontamination"), "against", []):
        if not Path(name).is_file() or not name.endswith(SUFFIXES):
            problems.append(
                f"steps.decontamination.against: {name!r} is not a file that ends in {' or '.join(SUFFIXES)}"
            )
    return problems
