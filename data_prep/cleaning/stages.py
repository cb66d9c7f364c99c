"""Passes of a cleaning over the documents, and its report."""

import inspect
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline import dedup
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader

from data_prep.cleaning import steps
from data_prep.cleaning.configuration import CleanConfig
from data_prep.cleaning.educational import EducationalFilter
from data_prep.cleaning.examples import KeepExamples, read_examples
from data_prep.cleaning.quality import Classifier
from data_prep.cleaning.step_settings import TOGETHER, block_class
from data_prep.common.files import write_text
from data_prep.reading.files import CLEANING_REPORT

MIN_HASHES, MAX_HASHES = 96, 160
MODEL, EXAMPLES = "model.npz", "examples"  # in the folder of a step: of the quality classifier, of dropped documents


class Stage(NamedTuple):
    """One pass: its name, datatrove's steps, and the number of tasks that it is divided into."""

    name: str
    pipeline: list[Any]
    tasks: int


def stages(config: CleanConfig, commits: dict[str, str | None]) -> list[Stage]:
    """The passes of a cleaning, in order. The last one, a single task, moves the result to its final folder.

    Steps that look at one document share a pass; the others read the output of a pass in passes of their own.

    Args:
        commits: of the data sets on the Hub, by the names of `CleanConfig.requests`.
    """
    work = Path(config.output) / "work"
    requests = {name: (source, commits[name]) for name, source in config.requests().items()}
    planned: list[Stage] = []
    names: list[str] = []
    read = partial(steps.read_sources, requests={name: requests[f"sources.{name}"] for name in config.sources})
    pipeline: list[Any] = [read, steps.Count("raw")]
    for name in config.running_steps():
        if name in TOGETHER:
            writer = steps.WritePass(work / name / "in")
            planned.append(Stage("+".join(names) or "read", [*pipeline, writer], config.tasks))
            names, pipeline = [], [_reader(work / name)]
            before, step = _step_together(config, name, work / name)
            planned += before
        else:
            if name == "quality_classifier":
                planned.append(_training(config, requests, work / name / MODEL))
            step = _step(config, name, work / name)
        pipeline += [step, steps.Count(name)]
        names.append(name)
    planned.append(Stage("+".join(names), [*pipeline, steps.write_sources(work / "out")], config.tasks))
    return [*planned, Stage("finish", [partial(finish, config=config)], 1)]


def _reader(folder: Path) -> JsonlReader:
    return JsonlReader(str(folder / "in"), add_file_path=False)


def _step(config: CleanConfig, name: str, folder: Path) -> PipelineStep:
    """A step that looks at one document, with the settings of each source."""
    settings = config.settings_of(name)
    if all(one == config.steps.get(name) for one in settings.values()):
        return _step_with(config, name, config.steps[name], folder, KeepExamples(folder / EXAMPLES))
    return steps.BySource(
        {
            source: _step_with(config, name, one, folder, KeepExamples(folder / EXAMPLES, source))
            for source, one in settings.items()
            if one is not None
        }
    )


def _step_with(config: CleanConfig, name: str, settings: Any, folder: Path, examples: KeepExamples) -> PipelineStep:
    if name == "min_length":
        return LambdaFilter(partial(steps.has_length, least=settings.characters), examples)
    if name == "quality_classifier":
        return steps.QualityFilter(folder / MODEL, config.seed, examples)
    if name == "educational":
        return EducationalFilter(settings, examples)
    kind: Any = {"trafilatura": steps.Extraction, "language": steps.Language}.get(name, block_class(name))
    others = {"language": config.language, "exclusion_writer": examples}
    taken = inspect.signature(block_class(name)).parameters
    return kind(**settings, **{key: value for key, value in others.items() if key in taken})


def _training(config: CleanConfig, requests: dict[str, steps.Request], model: Path) -> Stage:
    settings = config.steps["quality_classifier"]

    def of(kind: str) -> list[steps.Request]:
        return [found for name, found in requests.items() if name.startswith(f"steps.quality_classifier.{kind}.")]

    sizes = {"documents": settings.documents, "alpha": settings.alpha}
    train = partial(steps.train_classifier, curated=of("curated"), raw=of("raw"), **sizes, model=model)
    return Stage("quality_classifier_training", [train], 1)


def _step_together(config: CleanConfig, name: str, folder: Path) -> tuple[list[Stage], PipelineStep]:
    """The passes before a step that compares documents, and the step itself."""
    if name == "exact_dedup":
        return _exact_dedup(config, folder)
    if name == "minhash":
        return _minhash(config, config.steps[name], folder)
    return _decontamination(config, config.steps[name], folder)


def _exact_dedup(config: CleanConfig, folder: Path) -> tuple[list[Stage], Any]:
    rule = ExactDedupConfig(content_getter=_text)
    signatures, duplicates = str(folder / "signatures"), str(folder / "duplicates")
    sign = dedup.ExactDedupSignature(signatures, rule, finder_workers=config.tasks)
    before = [
        Stage("exact_dedup_signatures", [_reader(folder), sign], config.tasks),
        Stage("exact_dedup_search", [dedup.ExactFindDedups(signatures, duplicates, rule)], config.tasks),
    ]
    return before, dedup.ExactDedupFilter(duplicates, rule, KeepExamples(folder / EXAMPLES))


def _text(document: Document) -> str:
    return document.text


def _minhash(config: CleanConfig, settings: Any, folder: Path) -> tuple[list[Stage], Any]:
    buckets, rows = buckets_and_rows(settings.jaccard)
    rule = MinhashConfig(n_grams=settings.ngram, num_buckets=buckets, hashes_per_bucket=rows, seed=config.seed)
    signatures, pairs, removed = (str(folder / part) for part in ("signatures", "pairs", "removed"))
    sign = dedup.MinhashDedupSignature(signatures, rule, language=config.language)
    before = [
        Stage("minhash_signatures", [_reader(folder), sign], config.tasks),
        Stage("minhash_pairs", [dedup.MinhashDedupBuckets(signatures, pairs, config=rule)], buckets),
        Stage("minhash_clusters", [dedup.MinhashDedupCluster(pairs, removed, config=rule)], 1),
    ]
    return before, dedup.MinhashDedupFilter(removed, KeepExamples(folder / EXAMPLES))


def buckets_and_rows(jaccard: float) -> tuple[int, int]:
    """Number of buckets, and of hashes in each, that find pairs of this similarity with probability one half.

    Two documents of similarity s share one of b buckets of r hashes with probability 1 - (1 - s^r)^b, a step around
    s = (1/b)^(1/r) (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2). Returns the pair
    closest to that with 96 to 160 hashes in total; FineWeb uses 14 x 8.
    """
    pairs = [(b, r) for r in range(2, 33) for b in range(-(-MIN_HASHES // r), MAX_HASHES // r + 1)]
    return min(pairs, key=lambda pair: abs((1 / pair[0]) ** (1 / pair[1]) - jaccard))


def _decontamination(config: CleanConfig, settings: Any, folder: Path) -> tuple[list[Stage], Any]:
    index = partial(steps.build_index, against=settings.against, fields=settings.fields, folder=folder)
    remove = partial(steps.remove_common, folder=folder, common_documents=settings.common_documents)
    before = [
        Stage("decontamination_index", [index], 1),
        Stage("decontamination_count", [_reader(folder), partial(steps.count_ngrams, folder=folder)], config.tasks),
        Stage("decontamination_common", [remove], 1),
    ]
    return before, steps.Decontaminate(folder, KeepExamples(folder / EXAMPLES))


def finish(data: DocumentsPipeline, rank: int, world_size: int, *, config: CleanConfig) -> None:
    """Moves the documents to the output, writes the report, which shows that all is complete, and removes the files of
    the passes."""
    output = Path(config.output)
    work = output / "work"
    entries = report(config, work)
    for name in config.sources:
        if (work / "out" / name).exists():
            (work / "out" / name).rename(output / name)
    write_text(output / CLEANING_REPORT, json.dumps(entries, indent=2) + "\n")
    for name in [*config.running_steps(), "out"]:
        if (work / name).is_dir():
            shutil.rmtree(work / name)


def report(config: CleanConfig, work: Path) -> list[dict[str, Any]]:
    """Sizes before and after each step, by source and in total, and datatrove's reasons for dropped documents.

    Sums datatrove's statistics of all tasks, including those of interrupted runs.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("raw", *config.running_steps())}
    reasons: dict[str, Counter[str]] = {name: Counter() for name in config.running_steps()}
    for path in sorted(work.glob("logs/*/stats/*.json")):
        dropped: Counter[str] = Counter()
        for block in json.loads(path.read_text(encoding="utf-8")):
            stats = {key: stat["total"] if isinstance(stat, dict) else stat for key, stat in block["stats"].items()}
            kind, _, step = block["name"].partition(": ")
            if kind == steps.Count.type:
                counts[step].update(stats)
                if step in reasons:
                    reasons[step].update(dropped)
            dropped = Counter({key.removeprefix("dropped_"): n for key, n in stats.items() if "dropped_" in key})

    entries, before = [], counts["raw"]
    for name in config.running_steps():
        after = counts[name]
        entry: dict[str, Any] = {"step": name, "settings": _settings(config, name, work / name)}
        entry |= _in_and_out(before, after, config.sources)
        entry["sources"] = {source: _in_and_out(before, after, [source]) for source in config.sources}
        entry["dropped"] = dict(sorted(reasons[name].items()))
        entries.append({**entry, "examples": read_examples(work / name / EXAMPLES)})
        before = after
    return entries


def _settings(config: CleanConfig, name: str, folder: Path) -> dict[str, Any]:
    """The settings of a step, with those of the sources that have others, and the alpha that was fitted."""
    settings = _plain(config.steps.get(name)) or {}
    if name == "quality_classifier":
        settings["alpha"] = Classifier.load(folder / MODEL).alpha
    others = {source: one for source, one in config.settings_of(name).items() if one != config.steps.get(name)}
    return settings | ({"sources": {source: _plain(one) for source, one in others.items()}} if others else {})


def _plain(settings: Any) -> dict[str, Any] | None:
    return asdict(settings) if is_dataclass(settings) else settings  # type: ignore[arg-type]


def _in_and_out(before: Counter[str], after: Counter[str], sources: Iterable[str]) -> dict[str, int]:
    return {
        f"{unit}_{side}": sum(counts[f"{unit}/{source}"] for source in sources)
        for unit in ("documents", "characters")
        for side, counts in (("in", before), ("out", after))
    }
