"""Steps that datatrove has no block for: our reading of sources, counts, and those of GPT-3's appendices."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter

from data_prep.cleaning.configuration import local_files
from data_prep.cleaning.decontamination import Index, cut
from data_prep.cleaning.evaluation_sets import read_items
from data_prep.cleaning.quality import Classifier, keep
from data_prep.reading.sources import Source

SOURCE = "_source"  # in a document's metadata until it is written: which source it is from


class ReadSources(PipelineStep):
    """Read each file of the sources in one task, as `Corpus.records` does; documents without text are left out."""

    type, name = "READER", "sources"

    def __init__(self, files: dict[str, list[Path]], text_column: str) -> None:
        super().__init__()
        self.files = [(name, path) for name, paths in files.items() for path in paths]
        self.text_column = text_column

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for name, path in self.files[rank::world_size]:
            for number, record in enumerate(Source(str(path), text_column=self.text_column).resolve().records()):
                text = record.pop(self.text_column)
                if text.strip():
                    yield self._document(text, record, name, f"{path}/{number}")

    def _document(self, text: str, record: dict[str, Any], source: str, place: str) -> Document:
        identity, metadata = str(record.pop("id", place)), record.pop("metadata", {})
        if not isinstance(metadata, dict):
            metadata = {"metadata": metadata}
        return Document(text, identity, metadata={**metadata, **record, SOURCE: source})


class Count(PipelineStep):
    """Count the documents and characters of each source that pass here."""

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
    """Write exactly one file a task, be it empty: the next pass then deals the same documents to the same task."""

    def __init__(self, folder: Path) -> None:
        # zstd, as gzip's header has the time in it.
        super().__init__(str(folder), output_filename="${rank}.jsonl", compression="zstd")

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.output_mg.get_file(f"{rank:05d}.jsonl.zst")
        yield from super().run(data, rank, world_size)


class WriteSources(JsonlWriter):
    """Write a file a task for each source."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), f"${{{SOURCE}}}/${{rank}}.jsonl", compression="zstd", adapter=_without_source)


def _without_source(writer: JsonlWriter, document: Document) -> dict[str, Any]:
    metadata = {name: value for name, value in document.metadata.items() if name != SOURCE}
    return {"text": document.text, "id": document.id, "metadata": metadata}


class MinLengthFilter(BaseFilter):
    """Drop documents of fewer characters."""

    name = "minimum length"

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = characters

    def filter(self, doc: Document) -> bool:
        return len(doc.text) >= self.characters


class QualityFilter(BaseFilter):
    """Keep documents by the score of the classifier in `model` and a draw (`data_prep.cleaning.quality.keep`)."""

    name = "quality classifier"

    def __init__(self, model: Path, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        self.classifier: Classifier | None = None

    def filter(self, doc: Document) -> bool:
        if self.classifier is None:
            self.classifier = Classifier.load(self.model)
        score = self.classifier.score(doc.text)
        doc.metadata["quality_score"] = score
        return keep(score, doc.text, self.seed)


def train_classifier(
    data: DocumentsPipeline,
    rank: int,
    world_size: int,
    *,
    curated: list[str],
    raw: list[str],
    documents: int,
    column: str,
    model: Path,
) -> None:
    """Learn the classifier from the documents of these patterns, about `documents` of each kind, and save it."""

    def texts(patterns: list[str]) -> Iterator[str]:
        files = [path for pattern in patterns for path in local_files(pattern)]
        for path in files:
            found = Source(str(path), text_column=column).resolve().documents()
            yield from itertools.islice(found, -(-documents // len(files)))

    model.parent.mkdir(parents=True, exist_ok=True)
    Classifier.train(texts(curated), texts(raw)).save(model)


def build_index(
    data: DocumentsPipeline, rank: int, world_size: int, *, against: list[str], fields: list[str] | None, folder: Path
) -> None:
    """Index the n-grams of the evaluation sets into `folder`/all.npz."""
    texts = (text for path in against for item in read_items(Path(path), fields) for text in item)
    _save_index(folder / "all.npz", Index.build(texts))


class CountNgrams(PipelineStep):
    """Count in how many documents each n-gram of `folder`/all.npz is, into a file a task."""

    type, name = "INDEX", "n-grams"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        path = self.folder / f"counts_{rank:05d}.npy"
        np.save(path, count_documents(_load_index(self.folder / "all.npz"), (document.text for document in data)))


def count_documents(index: Index, texts: Iterable[str]) -> np.ndarray:
    """In how many of the `texts` each n-gram of the index is, `[n-grams]` uint32."""
    counts = np.zeros(len(index.hashes), dtype=np.uint32)
    for text in texts:
        counts[np.unique(index.find(text)[0])] += 1
    return counts


def leave_out_common(
    data: DocumentsPipeline, rank: int, world_size: int, *, folder: Path, common_documents: int
) -> None:
    """Write `folder`/used.npz: the index without the n-grams that are in more than `common_documents` documents."""
    index = _load_index(folder / "all.npz")
    total = np.zeros(len(index.hashes), dtype=np.int64)
    for path in sorted(folder.glob("counts_*.npy")):
        total += np.load(path)
    _save_index(folder / "used.npz", index.without(total > common_documents))


class Decontaminate(PipelineStep):
    """Cut the n-grams of `folder`/used.npz out of the documents; each piece that is left becomes a document."""

    type, name = "FORMAT", "decontamination"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        index = _load_index(self.folder / "used.npz")
        for document in data:
            spans = index.find(document.text)[1]
            if not len(spans):
                yield document
                continue
            pieces = cut(document.text, spans)
            self.stat_update("documents_cut" if pieces else "dropped_contaminated")
            for number, piece in enumerate(pieces):
                yield Document(piece, f"{document.id}/{number}", metadata=document.metadata)


def _save_index(path: Path, index: Index) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, hashes=index.hashes, lengths=np.array(index.lengths, dtype=np.int64))


def _load_index(path: Path) -> Index:
    with np.load(path) as file:
        return Index(file["hashes"], tuple(file["lengths"].tolist()))
