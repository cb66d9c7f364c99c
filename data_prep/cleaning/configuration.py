"""Configuration of a cleaning: read from YAML, and checked completely before anything runs."""

import dataclasses
import importlib.util
import pkgutil
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.cleaning.evaluation_sets import SUFFIXES
from data_prep.cleaning.step_settings import (
    STEPS,
    TOGETHER,
    Documents,
    Educational,
    check_packages,
    parameters,
    schema_of,
)
from data_prep.common.command_line import UserError, raise_all, unknown_name
from data_prep.common.schema import STRICT, Count, Positive, find_problems, read_yaml, validate
from data_prep.reading.corpus import Corpus
from data_prep.reading.files import CLEANING_REPORT
from data_prep.reading.sources import Source

INSTALL = 'pip install "gpt-accelerate[clean]"'
# Parameters of datatrove's executors that are not settings of `executor_settings`.
_EXECUTOR_ARGUMENTS = ("pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed")


@dataclass(frozen=True)
class CleaningSource(Documents):
    """A source, and steps that are other ones for it: settings, or false."""

    __pydantic_config__ = STRICT

    steps: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CleanConfig:
    """A cleaning; `data_prep/configs/clean.yaml` explains each setting.

    Once read, all `steps` have the settings of those that run, each a dataclass of `STEPS` or parameters of datatrove's
    block; those of a source also None for one that does not run for it.
    """

    __pydantic_config__ = STRICT

    sources: dict[str, CleaningSource] = field(default_factory=dict)
    output: str = ""
    steps: dict[str, Any] = field(default_factory=dict)
    text_column: str = "text"
    language: str = "eng"
    executor: Literal["local", "slurm", "ray"] = "local"
    executor_settings: dict[str, Any] = field(default_factory=dict)
    tasks: Positive = 1
    workers: Positive = 1
    seed: Count = 0

    def requests(self) -> dict[str, Source]:
        """All requests for documents, by the names of their settings."""
        found = {f"sources.{name}": source.request(self.text_column) for name, source in self.sources.items()}
        for kind in ("curated", "raw"):
            for number, documents in enumerate(getattr(self.steps.get("quality_classifier"), kind, [])):
                name = f"steps.quality_classifier.{kind}.{number}"
                found[name] = documents.request(self.text_column)
        return found

    def settings_of(self, step: str) -> dict[str, Any]:
        """The settings of a step for each source; None where it does not run."""
        return {name: source.steps.get(step, self.steps.get(step)) for name, source in self.sources.items()}

    def running_steps(self) -> list[str]:
        """The steps that run for any source, in order."""
        return [name for name in STEPS if any(settings is not None for settings in self.settings_of(name).values())]

    def identity(self, corpora: dict[str, Corpus]) -> dict[str, Any]:
        """All that determines the result: the settings except for the executor's, and the files that were found."""
        execution = ("executor", "executor_settings", "workers")
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in execution}
        found = {name: dataclasses.asdict(corpus.describe()) for name, corpus in corpora.items()}
        against = getattr(self.steps.get("decontamination"), "against", [])
        return {**fields, "found": found, "bytes": {name: Path(name).stat().st_size for name in against}}


def read_config(path: Path) -> CleanConfig:
    """Reads and checks a configuration (`UserError` with all problems)."""
    settings = _with_full_sources(read_yaml(path))
    if missing := [name for name in ("datatrove", "spacy", "sklearn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"cleaning needs {', '.join(missing)}, not installed here: {INSTALL}")
    found = find_problems(settings, CleanConfig, str(path))
    problems, wrong = [problem for _, problem in found], {name for name, _ in found}
    config = validate({name: settings[name] for name in settings if name not in wrong}, CleanConfig, str(path))
    config = _with_checked_steps(config, problems)
    if "executor" not in wrong:
        schema = parameters(executor_class(config.executor), _EXECUTOR_ARGUMENTS)
        _check(config.executor_settings, schema, "executor_settings", problems)
    try:
        pkgutil.resolve_name("datatrove.utils.word_tokenizers:load_word_tokenizer")(config.language)
    except (ValueError, ImportError) as error:
        problems.append(f"language={config.language!r}: {' '.join(str(error).split())}")
    problems += _file_problems(config)
    raise_all(problems, "problems", f"{path}: ")
    return config


def _with_full_sources(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with `{source: NAME}` for sources that are given by their names alone."""
    if isinstance(sources := settings.get("sources"), dict):
        settings["sources"] = {name: _full_source(source) for name, source in sources.items()}
    quality = settings["steps"].get("quality_classifier") if isinstance(settings.get("steps"), dict) else None
    for kind in ("curated", "raw"):
        if isinstance(quality, dict) and isinstance(quality.get(kind), list):
            quality[kind] = [_full_source(source) for source in quality[kind]]
    return settings


def _full_source(source: Any) -> Any:
    return {"source": source} if isinstance(source, str) else source


def _with_checked_steps(config: CleanConfig, problems: list[str]) -> CleanConfig:
    steps = {
        name: settings
        for name, settings in _read_steps(config.steps, "steps", problems).items()
        if settings is not None
    }
    sources = {}
    for name, source in config.sources.items():
        where = f"sources.{name}.steps"
        for step, settings in source.steps.items():
            if step in TOGETHER:
                problems.append(f"{where}: {step} compares documents of all sources; it cannot differ for one")
            elif step == "quality_classifier" and settings not in (None, False):
                problems.append(f"{where}: {step} has one model for all sources; one can only be exempt, by false")
        sources[name] = dataclasses.replace(source, steps=_read_steps(source.steps, where, problems))
    config = dataclasses.replace(config, steps=steps, sources=sources)
    if not problems and not config.running_steps():
        problems.append(f"steps: none is switched on; known: {', '.join(STEPS)}")
    return config


def _read_steps(given: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Steps with their settings, None for those that are switched off, in order of execution."""
    problems += [f"{where}: {unknown_name(name, STEPS)}" for name in given if name not in STEPS]
    steps: dict[str, Any] = {}
    for name in filter(given.__contains__, STEPS):
        settings = {} if given[name] is True else given[name]
        if settings is None or settings is False:
            steps[name] = None
        elif not isinstance(settings, dict):
            problems.append(f"{where}.{name}={settings!r}: true, false, or lines of `name: value`")
        elif _check(settings, schema := schema_of(name), f"{where}.{name}", problems):
            # datatrove's defaults are left to datatrove.
            steps[name] = settings if STEPS[name] is None else validate(settings, schema, f"{where}.{name}")
            if problem := _cannot_run(name, steps[name]):
                problems.append(f"{where}.{name}: {problem}")
    return steps


def _cannot_run(name: str, settings: Any) -> str | None:
    """What a step lacks: packages of datatrove's block, or a model of the right kind."""
    try:
        if isinstance(settings, Educational):
            pkgutil.resolve_name("data_prep.cleaning.educational:check")(settings)
        elif STEPS[name] is None:
            check_packages(name)
    except (UserError, ImportError) as error:
        return " ".join(str(error).split())
    return None


def _check(settings: dict[str, Any], schema: Any, where: str, problems: list[str]) -> bool:
    found = find_problems(settings, schema, where)
    problems += [f"{where}: {problem}" for _, problem in found]
    return not found


def executor_class(name: str) -> type:
    """datatrove's executor: `local`, `slurm` or `ray`."""
    return pkgutil.resolve_name(f"datatrove.executor.{name}:{name.capitalize()}PipelineExecutor")


def _file_problems(config: CleanConfig) -> list[str]:
    problems = [] if config.sources else ["sources: none is named"]
    problems += [] if config.output else ["output: no folder is named"]
    for name, source in config.sources.items():
        where, pattern = f"sources.{name}", source.source
        # The name becomes that of a folder beside cleaning.json and work/.
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name in ("work", CLEANING_REPORT):
            problems.append(f"{where}: a name is made of letters, digits, '_', '-' and '.', and is not 'work'")
        if config.output and Path(config.output).resolve().is_relative_to(Path(pattern).resolve()):
            problems.append(f"output={config.output!r} lies within {where}={pattern!r}; choose a folder beside it")
    for where, request in config.requests().items():
        try:
            corpus = request.resolve()
        except UserError as error:
            problems.append(f"{where}: {error}")
            continue
        if corpus.sizes and not corpus.bytes:
            problems.append(f"{where}: {request.source!r}: there is nothing in it")
    for name in getattr(config.steps.get("decontamination"), "against", []):
        if not Path(name).is_file() or not name.endswith(SUFFIXES):
            suffixes = " or ".join(SUFFIXES)
            problems.append(f"steps.decontamination.against: {name!r} is not a file that ends in {suffixes}")
    return problems
