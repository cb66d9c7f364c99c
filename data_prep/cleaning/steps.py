"""Steps that datatrove does not have: our reading of sources, counts, and those of GPT-3's appendices."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import LanguageFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter

from data_prep.cleaning.decontamination import WINDOW, Index, cut
from data_prep.cleaning.evaluation_sets import read_items
from data_prep.cleaning.examples import KeepExamples
from data_prep.cleaning.quality import Classifier, keep
from data_prep.common.command_line import UserError
from data_prep.reading.corpus import Corpus
from data_prep.reading.sources import Source

_MOST_BEYOND_ONE = 0.05  # fasttext adds 1e-5 to each of some hundred probabilities
SOURCE = "_source"  # name of the source, in a document's metadata until it is written


Request: TypeAlias = tuple[Source, str | None]  # with the commit of a data set on the Hub


def read_sources(
    data: DocumentsPipeline, rank: int, world_size: int, *, requests: dict[str, Request]
) -> DocumentsPipeline:
    """Reads a part of each source, as `Corpus.records` does; skips documents without text."""
    for offset, (name, (source, commit)) in enumerate(requests.items()):
        part = (rank + offset) % world_size  # sources of one file are read by different tasks
        for number, record in enumerate(source.resolve(commit).part(part, world_size).records()):
            text = record.pop(source.column)
            if text.strip():
                identity = str(record.pop("id", f"{name}/{part}/{number}"))
                metadata = record.pop("metadata", {})
                if not isinstance(metadata, dict):
                    metadata = {"metadata": metadata}
                yield Document(text, identity, metadata={**metadata, **record, SOURCE: name})


class BySource(PipelineStep):
    """A step for each source; the documents of a source without one pass."""

    def __init__(self, steps: dict[str, PipelineStep]) -> None:
        first = next(iter(steps.values()))
        self.type, self.name, self.steps = first.type, first.name, steps
        super().__init__()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        # A task reads one source after another, and all passes keep the order.
        for source, documents in itertools.groupby(data, key=lambda document: document.metadata[SOURCE]):
            step = self.steps.get(source)
            yield from step.run(documents, rank, world_size) if step else documents  # noqa: B031  once
        for step in self.steps.values():
            self.stats.stats = self.stats.stats + step.stats.stats


class Count(PipelineStep):
    """Counts the documents and characters of each source after a step."""

    type = "COUNT"

    def __init__(self, step: str) -> None:
        self.name = step
        super().__init__()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            source = document.metadata[SOURCE]
            self.stat_update(f"documents/{source}")
            self.stat_update(f"characters/{source}", value=len(document.text))
            yield document


class WritePass(JsonlWriter):
    """Writes exactly one file a task, even an empty one, so that the next pass gives each task the same documents."""

    def __init__(self, folder: Path) -> None:
        # zstd, because gzip's header contains the time.
        super().__init__(str(folder), output_filename="${rank}.jsonl", compression="zstd")

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.output_mg.get_file(f"{rank:05d}.jsonl.zst")
        yield from super().run(data, rank, world_size)


def write_sources(folder: Path) -> JsonlWriter:
    """Writes a file a task for each source."""
    return JsonlWriter(str(folder), f"${{{SOURCE}}}/${{rank}}.jsonl", compression="zstd", adapter=_without_source)


def _without_source(writer: JsonlWriter, document: Document) -> dict[str, Any]:
    metadata = {name: value for name, value in document.metadata.items() if name != SOURCE}
    return {"text": document.text, "id": document.id, "metadata": metadata}


class Extraction(Trafilatura):
    """datatrove's, with what it leaves out counted by reason."""

    _REASONS: ClassVar = {"dropped": "no_text"} | {name: name for name in ("timeout", "broken_process", "clean_error")}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        import trafilatura  # noqa: F401  not by the process that datatrove starts, whose time is limited

        yield from super().run(data, rank, world_size)

    def stat_update(self, *names: str, **options: Any) -> None:
        super().stat_update(*(f"dropped_{self._REASONS[n]}" if n in self._REASONS else n for n in names), **options)


class Language(LanguageFilter):
    """datatrove's, with a check that probabilities add up to 1: those of fasttext-numpy2-wheel 0.9.2 do not always."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.wanted, self.model.languages = self.model.languages, None
        self._predict, self.model.predict = self.model.predict, self._checked  # type: ignore[method-assign]

    def _checked(self, document: Document) -> tuple[Any, dict[str, float]]:
        best, found = self._predict(document)
        if abs(sum(found.values()) - 1) > _MOST_BEYOND_ONE:
            raise UserError(f"fasttext's probabilities of languages add up to {sum(found.values()):.2f}, not 1")
        return best, {name: found.get(name, 0.0) for name in self.wanted} if self.wanted else found


def has_length(document: Document, least: int) -> bool:
    """Whether a document has at least `least` characters."""
    return len(document.text) >= least


class QualityFilter(BaseFilter):
    """Keeps documents by the score of the classifier in `model` and a draw (`data_prep.cleaning.quality.keep`)."""

    name = "quality classifier"

    def __init__(self, model: Path, seed: int, examples: KeepExamples) -> None:
        super().__init__(examples)
        self.model, self.seed = model, seed
        self.classifier: Classifier | None = None

    def filter(self, doc: Document) -> bool:
        self.classifier = self.classifier or Classifier.load(self.model)
        doc.metadata["quality_score"] = score = self.classifier.score(doc.text)
        return keep(score, doc.text, self.classifier.alpha, self.seed)


def train_classifier(
    data: DocumentsPipeline,
    rank: int,
    world_size: int,
    *,
    curated: list[Request],
    raw: list[Request],
    documents: int,
    alpha: float | None,
    model: Path,
) -> None:
    """Trains the classifier on about `documents` documents of each kind, and saves it.

    Args:
        alpha: instead of the fitted one.
    """

    def texts(requests: list[Request]) -> Iterator[str]:
        parts = [part for source, commit in requests for part in _files(source.resolve(commit))]
        for part in parts:
            yield from itertools.islice(part.documents(), -(-documents // len(parts)))

    model.parent.mkdir(parents=True, exist_ok=True)
    classifier = Classifier.train(texts(curated), texts(raw))
    (classifier if alpha is None else replace(classifier, alpha=alpha)).save(model)


def _files(corpus: Corpus) -> list[Corpus]:
    """The first documents of a file are not those of all files, so each file is read."""
    return [corpus.part(number, len(corpus.paths)) for number in range(len(corpus.paths))] or [corpus]


def build_index(
    data: DocumentsPipeline, rank: int, world_size: int, *, against: list[str], fields: list[str] | None, folder: Path
) -> None:
    """Indexes the n-grams of the evaluation sets in `folder`/all.npz."""
    texts = (text for path in against for item in read_items(Path(path), fields) for text in item)
    folder.mkdir(parents=True, exist_ok=True)
    Index.build(texts).save(folder / "all.npz")


def count_ngrams(data: DocumentsPipeline, rank: int, world_size: int, *, folder: Path) -> None:
    """Counts the documents with each n-gram of `folder`/all.npz, into a file a task."""
    counts = count_documents(Index.load(folder / "all.npz"), (document.text for document in data))
    np.save(folder / f"counts_{rank:05d}.npy", counts)


def count_documents(index: Index, texts: Iterable[str]) -> np.ndarray:
    """Number of `texts` with each n-gram of the index, `[n-grams]` uint32."""
    counts = np.zeros(len(index.hashes), dtype=np.uint32)
    for text in texts:
        counts[np.unique(index.find(text)[0])] += 1
    return counts


def remove_common(data: DocumentsPipeline, rank: int, world_size: int, *, folder: Path, common_documents: int) -> None:
    """Writes `folder`/used.npz: the index without the n-grams in more than `common_documents` documents."""
    index = Index.load(folder / "all.npz")
    total = np.zeros(len(index.hashes), dtype=np.int64)
    for path in folder.glob("counts_*.npy"):
        total += np.load(path)
    index.without(total > common_documents).save(folder / "used.npz")


class Decontaminate(PipelineStep):
    """Cuts the n-grams of `folder`/used.npz out of the documents; each remaining piece becomes a document."""

    type, name = "FORMAT", "decontamination"

    def __init__(self, folder: Path, examples: KeepExamples) -> None:
        super().__init__()
        self.folder, self.examples = folder, examples

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        index = Index.load(self.folder / "used.npz")
        for document in data:
            spans = index.find(document.text)[1]
            if not len(spans):
                yield document
                continue
            pieces = cut(document.text, spans)
            self.stat_update("documents_cut" if pieces else "dropped_contaminated")
            first = document.text[max(0, spans[0][0] - WINDOW) : spans[0][1] + WINDOW]
            self.examples.write(Document(first, document.id, metadata={"filter_reason": "contaminated"}), rank)
            for number, piece in enumerate(pieces):
                yield Document(piece, f"{document.id}/{number}", metadata=document.metadata)
