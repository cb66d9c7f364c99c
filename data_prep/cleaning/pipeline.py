"""A cleaning: its settings, checked against the signatures of datatrove's blocks, and its passes over the documents."""

import importlib.util
import inspect
import json
import pickle
import pkgutil
import re
import types
import typing
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from datatrove.data import DocumentsPipeline
from datatrove.pipeline import extractors, filters, formatters, readers
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from data_prep.cleaning import steps
from data_prep.cleaning.steps import Stage, Step
from data_prep.common.command_line import UserError, first_line, raise_all, unknown_name
from data_prep.common.files import write_text
from data_prep.common.schema import STRICT, Positive, find_problems, read_json_lines, read_yaml, validate
from data_prep.sources.corpus import Corpus
from data_prep.sources.files import CLEANING_REPORT
from data_prep.sources.opening import open_source
from data_prep.sources.source import Source

INSTALL = 'pip install "gpt-accelerate[clean]"'


class CleaningSource(BaseModel):
    """A source to clean: parameters of `data_prep.sources.source.Source`, or a datatrove reader with its parameters."""

    model_config = ConfigDict(**{**STRICT, "extra": "allow"})
    reader: str | None = None


class StepSettings(BaseModel):
    """A step and its parameters; it applies to `sources` only, or to all of them if None."""

    model_config = ConfigDict(**{**STRICT, "extra": "allow"})
    step: str
    sources: list[str] | None = None


def _named(key: str) -> BeforeValidator:
    return BeforeValidator(lambda given: {key: given} if isinstance(given, str) else given)


class CleanConfig(BaseModel):
    """Settings of a cleaning, explained in `data_prep/configs/clean.yaml`."""

    model_config = STRICT
    sources: dict[str, Annotated[CleaningSource, _named("source")]] = Field(default_factory=dict)
    output: str = ""
    steps: list[Annotated[StepSettings, _named("step")]] = Field(default_factory=list)
    executor: Literal["local", "slurm", "ray"] = "local"
    executor_settings: dict[str, Any] = Field(default_factory=dict)
    tasks: Positive = 1
    workers: Positive = 1


def read_config(path: Path) -> CleanConfig:
    """Reads and checks a configuration (`UserError` with all problems)."""
    settings = read_yaml(path)
    if missing := [name for name in ("datatrove", "spacy", "sklearn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"cleaning needs {', '.join(missing)}, not installed here: {INSTALL}")
    from data_prep.cleaning.steps import Stage

    found = find_problems(settings, CleanConfig, str(path))
    problems, wrong = [problem for _, problem in found], {name for name, _ in found}
    config = validate({name: settings[name] for name in settings if name not in wrong}, CleanConfig, str(path))
    if "executor" not in wrong:
        make_executor(config, Stage("", [], 1), Path("logs"), None, problems)
    plan(config, {}, problems)
    raise_all(list(dict.fromkeys(problems)), "problems", f"{path}: ")
    return config


def make_executor(config: CleanConfig, stage: Any, logs: Path, depends: Any, problems: list[str]) -> Any:
    """Makes datatrove's executor of a pass, to run after `previous`; adds to `problems` as `construct` does."""
    name = config.executor
    kind = pkgutil.resolve_name(f"datatrove.executor.{name}:{name.capitalize()}PipelineExecutor")
    ours = {"pipeline": stage.pipeline, "tasks": stage.tasks, "workers": min(config.workers, stage.tasks)}
    ours |= {"logging_dir": str(logs), "depends": depends, "skip_completed": True}
    return construct(kind, config.executor_settings, "executor_settings", problems, **ours)


def construct(kind: Callable[..., Any], settings: dict[str, Any], where: str, problems: list[str], **ours: Any) -> Any:
    """Calls `kind` with the settings as arguments; if it rejects them, adds the reason to `problems` and returns None.

    Args:
        where: the name of the settings, for messages.
        ours: arguments that are no settings, for those parameters that `kind` has.
    """
    parameters = inspect.signature(kind, eval_str=True).parameters
    fields: dict[str, Any] = {
        name: (_with_lists(parameter.annotation), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in parameters.items()
        if name not in ours and parameter.kind is not parameter.VAR_KEYWORD
    }
    schema = create_model(kind.__name__, __config__={**STRICT, "arbitrary_types_allowed": True}, **fields)
    if found := find_problems(settings, schema, where):
        problems += [f"{where}: {problem}" for _, problem in found]
        return None
    try:
        if "language" in parameters:
            language = settings.get("language", parameters["language"].default)
            pkgutil.resolve_name("datatrove.utils.word_tokenizers:load_word_tokenizer")(language)
        return kind(**settings, **{name: value for name, value in ours.items() if name in parameters})
    except Exception as error:  # datatrove's constructors raise many types
        problems.append(f"{where}: {first_line(error)}")
        return None


def _with_lists(hint: Any) -> Any:
    """Accepts lists where a type hint says tuple: datatrove annotates tuples of any length as `tuple[int]`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.Union[tuple(map(_with_lists, typing.get_args(hint)))]  # noqa: UP007
    return list if tuple in (hint, typing.get_origin(hint)) else hint


TOGETHER = ("MinhashDedup", "Decontamination")  # steps that compare documents with each other


def _classes(*modules: Any) -> dict[str, Any]:
    found = {name: kind for module in modules for name, kind in inspect.getmembers(module, inspect.isclass)}
    return {name: k for name, k in found.items() if issubclass(k, PipelineStep) and not inspect.isabstract(k)}


def plan(
    config: CleanConfig, commits: dict[str, str | None], problems: list[str]
) -> tuple[dict[str, Corpus], list[Stage]]:
    """Opens the sources (unless a datatrove reader reads them) and plans the passes over them.

    Args:
        commits: of the sources on the Hub, from an earlier call.
        problems: gets all that is wrong with the sources and steps.
    """
    problems += [] if config.sources else ["sources: none is named"]
    problems += [] if config.output else ["output: no folder is named"]
    known, corpora = _classes(readers), {}
    found: dict[str, Any] = dict.fromkeys(config.sources)
    for name, source in config.sources.items():
        where, settings = f"sources.{name}", source.model_extra or {}
        # The name becomes that of a folder beside cleaning.json and work/.
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name in ("work", CLEANING_REPORT):
            problems.append(f"{where}: a name is made of letters, digits, '_', '-' and '.', and is not 'work'")
        place = str(settings.get("source", settings.get("data_folder")))
        if config.output and Path(config.output).resolve().is_relative_to(Path(place).resolve()):
            problems.append(f"output={config.output!r} lies within {where}={place!r}; choose a folder beside it")
        if source.reader in known:
            found[name] = construct(known[source.reader], settings, where, problems)
        elif source.reader is not None:
            problems.append(f"{where}: {unknown_name(source.reader, known)}")
        elif request := construct(Source, settings, where, problems, tokens_column=None):
            try:
                corpora[name] = corpus = open_source(request, commits.get(name))
                found[name] = request, corpus.commit
                if corpus.sizes and not corpus.bytes:
                    problems.append(f"{where}: {place!r}: there is nothing in it")
            except UserError as error:
                problems.append(f"{where}: {error}")
    return corpora, _stages(config, steps.SourceReader(found, config.tasks), problems)


def _stages(config: CleanConfig, reader: steps.SourceReader, problems: list[str]) -> list[Stage]:
    """The passes of a cleaning, in order. The last one, a single task, moves the result to its final folder.

    Steps that look at one document share a pass; the others read the output of a pass in passes of their own.
    """
    work, names, tasks = Path(config.output) / "work", list(config.sources), config.tasks * len(config.sources)
    ours = {name: getattr(steps, name) for name in ("Trafilatura", "LanguageFilter", "QualityClassifier", *TOGETHER)}
    known = _classes(extractors, filters, formatters) | ours
    planned: list[Stage] = []
    pipeline: list[Any] = [reader, Step("raw")]
    running: list[str] = []
    for number, step in enumerate(config.steps):
        where, folder = f"steps.{step.step}", work / f"{number:02d}"
        own = names if step.sources is None else step.sources
        problems += [f"{where}: sources: {unknown_name(name, names)}" for name in own if name not in names]
        if step.step not in known:
            problems.append(f"steps: {unknown_name(step.step, known)}")
            continue
        if step.step in TOGETHER:
            if step.sources is not None:
                problems.append(f"{where}: it compares documents of all sources, and cannot be for some of them")
            planned.append(Stage("+".join(running) or "read", [*pipeline, steps.WritePass(folder)], tasks))
            pipeline, running = [steps.read_pass(folder)], []
        arguments = {"folder": folder, "exclusion_writer": steps.Examples(folder / "examples"), "reader": reader}
        block = construct(known[step.step], step.model_extra or {}, where, problems, **arguments)
        planned += block.passes(tasks) if hasattr(block, "passes") else []
        ranks = frozenset(rank for rank in range(tasks) if names[rank // config.tasks] in own)
        pipeline.append(Step(f"{number:02d}", block, ranks))
        running.append(step.step)
    problems += [] if config.steps else [f"steps: none is named; known: {', '.join(known)}"]
    write = JsonlWriter(str(work / "out"), compression="zstd")
    planned.append(Stage("+".join(running), [*pipeline, write], tasks))
    return [*planned, Stage("finish", [partial(finish, config=config)], 1)]


def finish(data: DocumentsPipeline, rank: int, world_size: int, *, config: CleanConfig) -> None:
    """Moves the documents to the output and writes the report, which marks the cleaning as complete."""
    output, names = Path(config.output), list(config.sources)
    for path in sorted((output / "work" / "out").glob("*.jsonl.zst")):
        source, part = divmod(int(path.name.partition(".")[0]), config.tasks)
        (output / names[source]).mkdir(exist_ok=True)
        path.rename(output / names[source] / f"{part:05d}.jsonl.zst")
    write_text(output / CLEANING_REPORT, json.dumps(report(config, output / "work"), indent=2) + "\n")


def report(config: CleanConfig, work: Path) -> list[dict[str, Any]]:
    """Sizes before and after each step, by source and in total, and datatrove's reasons for dropped documents.

    Sums datatrove's statistics of all tasks, including those of interrupted runs.
    """
    names = list(config.sources)
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by step and source
    for path in work.glob("logs/*/stats/*.json"):
        for block in json.loads(path.read_text(encoding="utf-8")):
            kind, _, step = block["name"].partition(": ")
            if kind == Step.type:
                stats = {key: one["total"] if isinstance(one, dict) else one for key, one in block["stats"].items()}
                counts[step, names[int(path.stem) // config.tasks]].update(stats)

    def sizes(before: str, after: str, sources: list[str]) -> dict[str, int]:
        return {
            f"{unit}_{side}": sum(counts[step, source][unit] for source in sources)
            for unit in ("documents", "characters")
            for side, step in (("in", before), ("out", after))
        }

    entries, before = [], "raw"
    for number, step in enumerate(config.steps):
        after = f"{number:02d}"
        settings = step.model_dump(exclude={"step"}, exclude_none=True)
        if step.step == "QualityClassifier":
            settings["alpha"] = pickle.loads((work / after / steps.MODEL).read_bytes()).alpha
        total = sum((counts[after, source] for source in names), Counter())
        examples: dict[str, str] = {}
        for path in sorted((work / after / "examples").glob("*.jsonl")):
            examples = {one["id"]: one["text"] for one in read_json_lines(path, dict[str, str])} | examples
        entries.append(
            {
                "step": step.step,
                "settings": settings,
                **sizes(before, after, names),
                "sources": {source: sizes(before, after, [source]) for source in names},
                "dropped": {key[8:]: n for key, n in sorted(total.items()) if key.startswith("dropped_")},
                "examples": dict(sorted(examples.items())),
            }
        )
        before = after
    return entries
