"""Passes of a cleaning over the documents, and its report."""

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
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader

from data_prep.cleaning import steps
from data_prep.cleaning.configuration import CleanConfig, filter_class
from data_prep.common.files import write_text
from data_prep.reading.sources import CLEANING_REPORT

MIN_HASHES, MAX_HASHES = 96, 160


class Stage(NamedTuple):
    """One pass: its name, datatrove's steps, and the number of tasks that it is divided into."""

    name: str
    pipeline: list[Any]
    tasks: int


def stages(config: CleanConfig) -> list[Stage]:
    """The passes of a cleaning, in order. The last one, a single task, moves the result to its final folder.

    Steps that look at one document share a pass; the others read the output of a pass in passes of their own.
    """
    work = Path(config.output) / "work"
    planned: list[Stage] = []
    names: list[str] = []
    read = partial(steps.read_sources, files=config.files(), text_column=config.text_column)
    pipeline: list[Any] = [read, steps.Count("raw")]
    for name, settings in config.steps.items():
        if name in ("exact_dedup", "minhash", "decontamination"):
            writer = steps.WritePass(work / name / "in")
            planned.append(Stage("+".join(names) or "read", [*pipeline, writer], config.tasks))
            names, pipeline = [], [_reader(work / name)]
        before, step = _step(config, name, settings, work / name)
        planned += before
        pipeline += [step, steps.Count(name)]
        names.append(name)
    planned.append(Stage("+".join(names), [*pipeline, steps.write_sources(work / "out")], config.tasks))
    return [*planned, Stage("finish", [partial(finish, config=config)], 1)]


def _reader(folder: Path) -> JsonlReader:
    return JsonlReader(str(folder / "in"), add_file_path=False)


def _step(config: CleanConfig, name: str, settings: Any, folder: Path) -> tuple[list[Stage], Any]:
    """The passes before a step, and the step itself."""
    if name == "min_length":
        return [], LambdaFilter(partial(steps.has_length, least=settings.characters))
    if name == "quality_classifier":
        model = folder / "model.npz"
        train = partial(steps.train_classifier, settings=settings, column=config.text_column, model=model)
        return [Stage("quality_classifier_training", [train], 1)], steps.QualityFilter(model, config.seed)
    if name == "exact_dedup":
        return _exact_dedup(config, folder)
    if name == "minhash":
        return _minhash(config, settings, folder)
    if name == "decontamination":
        return _decontamination(config, settings, folder)
    return [], filter_class(name)(**settings, language=config.language)


def _exact_dedup(config: CleanConfig, folder: Path) -> tuple[list[Stage], Any]:
    rule = ExactDedupConfig(content_getter=_text)
    signatures, duplicates = str(folder / "signatures"), str(folder / "duplicates")
    sign = dedup.ExactDedupSignature(signatures, rule, finder_workers=config.tasks)
    before = [
        Stage("exact_dedup_signatures", [_reader(folder), sign], config.tasks),
        Stage("exact_dedup_search", [dedup.ExactFindDedups(signatures, duplicates, rule)], config.tasks),
    ]
    return before, dedup.ExactDedupFilter(duplicates, rule)


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
    return before, dedup.MinhashDedupFilter(removed)


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
    return before, steps.Decontaminate(folder)


def finish(data: DocumentsPipeline, rank: int, world_size: int, *, config: CleanConfig) -> None:
    """Moves the documents to the output, writes the report, which shows that all is complete, and removes the files of
    the passes."""
    output = Path(config.output)
    work = output / "work"
    entries = report(config, work / "logs")
    for name in config.sources:
        if (work / "out" / name).exists():
            (work / "out" / name).rename(output / name)
    write_text(output / CLEANING_REPORT, json.dumps(entries, indent=2) + "\n")
    for name in [*config.steps, "out"]:
        if (work / name).is_dir():
            shutil.rmtree(work / name)


def report(config: CleanConfig, logs: Path) -> list[dict[str, Any]]:
    """Sizes before and after each step, by source and in total, and datatrove's reasons for dropped documents.

    Sums datatrove's statistics of all tasks, including those of interrupted runs.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("raw", *config.steps)}
    reasons: dict[str, Counter[str]] = {name: Counter() for name in config.steps}
    for path in sorted(logs.glob("*/stats/*.json")):
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
    for name, settings in config.steps.items():
        after = counts[name]
        entry = {"step": name, "settings": asdict(settings) if is_dataclass(settings) else settings}  # type: ignore[arg-type]
        entry |= _in_and_out(before, after, config.sources)
        entry["sources"] = {source: _in_and_out(before, after, [source]) for source in config.sources}
        entries.append({**entry, "dropped": dict(sorted(reasons[name].items()))})
        before = after
    return entries


def _in_and_out(before: Counter[str], after: Counter[str], sources: Iterable[str]) -> dict[str, int]:
    return {
        f"{unit}_{side}": sum(counts[f"{unit}/{source}"] for source in sources)
        for unit in ("documents", "characters")
        for side, counts in (("in", before), ("out", after))
    }
