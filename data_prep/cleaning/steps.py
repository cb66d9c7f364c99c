"""Steps that datatrove does not have: our reading of sources, counts, and those of GPT-3's appendices."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter

from data_prep.cleaning.configuration import QualityClassifier, local_files
from data_prep.cleaning.decontamination import Index, cut
from data_prep.cleaning.evaluation_sets import read_items
from data_prep.cleaning.quality import Classifier, keep
from data_prep.reading.sources import Source

SOURCE = "_source"  # name of the source, in a document's metadata until it is written


def read_sources(
    data: DocumentsPipeline, rank: int, world_size: int, *, files: dict[str, list[Path]], text_column: str
) -> DocumentsPipeline:
    """Reads each file of the sources in one task, as `Corpus.records` does; skips documents without text."""
    for name, path in [(name, path) for name, paths in files.items() for path in paths][rank::world_size]:
        for number, record in enumerate(Source(str(path), text_column=text_column).resolve().records()):
            text = record.pop(text_column)
            if text.strip():
                identity, metadata = str(record.pop("id", f"{path}/{number}")), record.pop("metadata", {})
                if not isinstance(metadata, dict):
                    metadata = {"metadata": metadata}
                yield Document(text, identity, metadata={**metadata, **record, SOURCE: name})


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


def has_length(document: Document, least: int) -> bool:
    """Whether a document has at least `least` characters."""
    return len(document.text) >= least


class QualityFilter(BaseFilter):
    """Keeps documents by the score of the classifier in `model` and a draw (`data_prep.cleaning.quality.keep`)."""

    name = "quality classifier"

    def __init__(self, model: Path, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        self.classifier: Classifier | None = None

    def filter(self, doc: Document) -> bool:
        self.classifier = self.classifier or Classifier.load(self.model)
        doc.metadata["quality_score"] = score = self.classifier.score(doc.text)
        return keep(score, doc.text, self.seed)


def train_classifier(
    data: DocumentsPipeline, rank: int, world_size: int, *, settings: QualityClassifier, column: str, model: Path
) -> None:
    """Trains the classifier on about `settings.documents` documents of each kind, and saves it."""

    def texts(patterns: list[str]) -> Iterator[str]:
        files = [path for pattern in patterns for path in local_files(pattern)]
        for path in files:
            found = Source(str(path), text_column=column).resolve().documents()
            yield from itertools.islice(found, -(-settings.documents // len(files)))

    model.parent.mkdir(parents=True, exist_ok=True)
    Classifier.train(texts(settings.curated), texts(settings.raw)).save(model)


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

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        index = Index.load(self.folder / "used.npz")
        for document in data:
            spans = index.find(document.text)[1]
            if not len(spans):
                yield document
                continue
            pieces = cut(document.text, spans)
            self.stat_update("documents_cut" if pieces else "dropped_contaminated")
            for number, piece in enumerate(pieces):
                yield Document(piece, f"{document.id}/{number}", metadata=document.metadata)
