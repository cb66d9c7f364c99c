"""Passes of a cleaning over the documents, and its report."""

import inspect
import json
import pickle
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline import extractors, filters, formatters, readers
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter

from data_prep.cleaning import steps
from data_prep.cleaning.configuration import CleanConfig, construct
from data_prep.cleaning.steps import Stage, Step
from data_prep.common.command_line import UserError, unknown_name
from data_prep.common.files import write_text
from data_prep.common.schema import read_json_lines
from data_prep.sources.corpus import Corpus
from data_prep.sources.files import CLEANING_REPORT
from data_prep.sources.opening import open_source
from data_prep.sources.source import Source

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
