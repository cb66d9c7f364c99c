"""Steps that datatrove lacks: reading our sources, counting each step, and the steps of GPT-3's appendices."""

import copy
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline import dedup, extractors, filters
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.stats import Stats
from pydantic import Field

from data_prep.cleaning.decontamination import COMMON_DOCUMENTS, WINDOW, Index, count_documents, cut, read_items
from data_prep.cleaning.quality import Classifier, keep
from data_prep.common.command_line import UserError, unknown_name
from data_prep.common.schema import Positive
from data_prep.sources.opening import open_source

MODEL = "model.pickle"  # of the quality classifier, in the folder of its step
_EXAMPLE_CHARACTERS = 600
_MAX_PROB_EXCESS = 0.05  # fasttext adds 1e-5 to each of some hundred probabilities
_REASONS = ("timeout", "broken_process", "clean_error")  # for what datatrove's extractors leave out


class Stage(NamedTuple):
    """One pass over the documents: its name, datatrove's steps, and its number of tasks."""

    name: str
    pipeline: list[Any]
    tasks: int


class SourceReader(PipelineStep):
    """Reads one source in each task: task `rank` reads part `rank % parts` of source `rank // parts`.

    Args:
        sources: by name, a reader of datatrove, or a `data_prep.sources.source.Source` and its commit on the Hub.
        parts: of each source.
    """

    type, name = "READER", "sources"

    def __init__(self, sources: dict[str, Any], parts: int) -> None:
        self.sources, self.parts = sources, parts
        super().__init__()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from self.read(list(self.sources)[rank // self.parts], rank % self.parts)

    def read(self, name: str, part: int) -> DocumentsPipeline:
        """Documents of a part of a source; those without text are skipped."""
        if isinstance(source := self.sources[name], PipelineStep):
            yield from source.run(None, part, self.parts)
            return
        request, commit = source
        for number, record in enumerate(open_source(request, commit).part(part, self.parts).records()):
            text = record.pop(request.column)
            if text.strip():
                identity = str(record.pop("id", f"{name}/{part}/{number}"))
                metadata = record.pop("metadata", {})
                metadata = metadata if isinstance(metadata, dict) else {"metadata": metadata}
                yield Document(text, identity, metadata={**metadata, **record})


class Step(PipelineStep):
    """A cleaning step: runs a block in the tasks of its sources and counts what is left."""

    type = "STEP"

    def __init__(self, name: str, block: Any = None, ranks: frozenset[int] = frozenset()) -> None:
        self.name, self.block, self.ranks = name, block, ranks
        super().__init__()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.stats = Stats(str(self))  # a job of Slurm may run several tasks
        block = copy.deepcopy(self.block) if rank in self.ranks else None
        for document in block.run(data, rank, world_size) if block else data:
            self.stat_update("documents")
            self.stat_update("characters", value=len(document.text))
            yield document
        for label, stat in block.stats.stats.items() if block else ():
            if label.startswith("dropped_") or label in _REASONS:
                self.stats[f"dropped_{label.removeprefix('dropped_')}"] = stat


class WritePass(JsonlWriter):
    """Writes exactly one file per task, even an empty one, so that each task of the next pass gets the same
    documents."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder / "in"), compression="zstd")  # gzip's header contains the time

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.output_mg.get_file(f"{rank:05d}.jsonl.zst")
        yield from super().run(data, rank, world_size)


def read_pass(folder: Path) -> JsonlReader:
    """Reads the output of the `WritePass` step with this folder."""
    return JsonlReader(str(folder / "in"), add_file_path=False)


class Examples(JsonlWriter):
    """datatrove's writer of dropped documents, which records the beginning of the first document per reason."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), compression=None)
        self.seen: set[str] = set()

    def write(self, document: Document, rank: int = 0, **kwargs: Any) -> None:
        """As in datatrove."""
        reason = document.metadata.get("filter_reason", "dropped")
        if reason not in self.seen:
            self.seen.add(reason)
            super().write(Document(document.text[:_EXAMPLE_CHARACTERS], reason), rank)


class Trafilatura(extractors.Trafilatura):
    """datatrove's Trafilatura; loads the library before starting the process whose time is limited."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        import trafilatura  # noqa: F401

        yield from super().run(data, rank, world_size)


class LanguageFilter(filters.LanguageFilter):
    """datatrove's language filter; checks that probabilities add up to 1, since those of fasttext-numpy2-wheel 0.9.2
    sometimes do not."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        predict, wanted = self.model.predict, self.model.languages

        def checked(document: Document) -> tuple[Any, dict[str, float]]:
            best, found = predict(document)
            if abs(sum(found.values()) - 1) > _MAX_PROB_EXCESS:
                raise UserError(f"fasttext's probabilities of languages add up to {sum(found.values()):.2f}, not 1")
            return best, {name: found.get(name, 0.0) for name in wanted} if wanted else found

        self.model.languages, self.model.predict = None, checked
        yield from super().run(data, rank, world_size)


class MinhashDedup(dedup.MinhashDedupFilter):
    """Keeps one of several documents with nearly the same set of word n-grams; the defaults are FineWeb's."""

    def __init__(
        self,
        n_grams: Positive = 5,
        num_buckets: Positive = 14,
        hashes_per_bucket: Positive = 8,
        seed: int = 1,
        language: str = "eng",
        *,
        folder: Path,
        exclusion_writer: Any,
    ) -> None:
        self.folder, self.language = folder, language
        self.config: MinhashConfig = MinhashConfig(n_grams, num_buckets, hashes_per_bucket, seed)
        super().__init__(str(folder / "removed"), exclusion_writer)

    def passes(self, tasks: int) -> list[Stage]:
        """The passes before this step."""
        signatures, pairs, removed = (str(self.folder / name) for name in ("signatures", "pairs", "removed"))
        sign = dedup.MinhashDedupSignature(signatures, self.config, language=self.language)
        search = dedup.MinhashDedupBuckets(signatures, pairs, config=self.config)
        return [
            Stage("MinhashDedup_signatures", [read_pass(self.folder), sign], tasks),
            Stage("MinhashDedup_pairs", [search], self.config.num_buckets),
            Stage("MinhashDedup_clusters", [dedup.MinhashDedupCluster(pairs, removed, config=self.config)], 1),
        ]


class QualityClassifier(BaseFilter):
    """Keeps documents by the score of GPT-3's classifier and a random draw (`data_prep.cleaning.quality.keep`).

    Args:
        curated, raw: names of sources to learn from; takes about five bytes of memory for each byte of text.
        documents: number to learn from, of each kind.
        alpha: fitted to the scores of curated documents if not given; GPT-3's was 9.
    """

    name = "quality classifier"

    def __init__(
        self,
        curated: list[str],
        raw: list[str],
        documents: Positive = 100_000,
        alpha: Annotated[float, Field(gt=0)] | None = None,
        seed: int = 0,
        *,
        folder: Path,
        reader: SourceReader,
        exclusion_writer: Any,
    ) -> None:
        if unknown := [name for name in curated + raw if name not in reader.sources]:
            raise UserError(f"curated and raw are names of sources: {unknown_name(unknown[0], reader.sources)}")
        super().__init__(exclusion_writer, batch_size=64)
        self.curated, self.raw, self.documents, self.alpha, self.seed = curated, raw, documents, alpha, seed
        self.reader, self.model = reader, folder / MODEL
        self.classifier: Any = None

    def passes(self, tasks: int) -> list[Stage]:
        """The pass before this step."""
        return [Stage("QualityClassifier_training", [self.train], 1)]

    def train(self, data: DocumentsPipeline, rank: int, world_size: int) -> None:
        """Trains the classifier, and saves it."""
        self.model.parent.mkdir(parents=True, exist_ok=True)
        classifier = Classifier.train(self._texts(self.curated), self._texts(self.raw), self.alpha)
        self.model.write_bytes(pickle.dumps(classifier))

    def _texts(self, names: list[str]) -> Iterator[str]:
        """The first documents of each part: those of one are not like those of all."""
        count = -(-self.documents // (len(names) * self.reader.parts))
        for name, part in itertools.product(names, range(self.reader.parts)):
            yield from (document.text for document in itertools.islice(self.reader.read(name, part), count))

    def filter(self, doc: Document) -> Any:
        """As in datatrove."""
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[Any]:
        """As in datatrove."""
        self.classifier = self.classifier or pickle.loads(self.model.read_bytes())
        kept = []
        for document, score in zip(batch, self.classifier.scores([one.text for one in batch]), strict=True):
            document.metadata["quality_score"] = score
            kept.append(keep(score, document.text, self.classifier.alpha, self.seed))
        return kept


class Decontamination(PipelineStep):
    """GPT-3's decontamination: removes n-grams of evaluation sets; each remaining piece becomes a document.

    Args:
        against: files of evaluation sets.
        fields: of a record that make up an item, as in `read_items`.
        common_documents: n-grams in more documents than this are common phrases, and are kept.
    """

    type, name = "FORMAT", "decontamination"

    def __init__(
        self,
        against: list[str],
        fields: list[str] | None = None,
        common_documents: Positive = COMMON_DOCUMENTS,
        *,
        folder: Path,
        exclusion_writer: Any,
    ) -> None:
        if wrong := [name for name in against if not Path(name).is_file() or not name.endswith((".jsonl", ".txt"))]:
            raise UserError(f"against: {wrong[0]!r} is not a file that ends in .jsonl or .txt")
        super().__init__()
        self.against, self.fields, self.common_documents = against, fields, common_documents
        self.folder, self.exclusion_writer = folder, exclusion_writer

    def passes(self, tasks: int) -> list[Stage]:
        """The pass before this step."""
        return [Stage("Decontamination_count", [read_pass(self.folder), self.count], tasks)]

    def _index(self) -> Index:
        items = (item for path in self.against for item in read_items(Path(path), self.fields))
        return Index.build(itertools.chain.from_iterable(items))

    def count(self, data: DocumentsPipeline, rank: int, world_size: int) -> None:
        """Counts the documents with each n-gram, into a file a task."""
        counts = count_documents(self._index(), (document.text for document in data))
        found = np.flatnonzero(counts)
        np.save(self.folder / f"counts_{rank:05d}.npy", np.stack([found, counts[found]]))

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        index = self._index()
        total = np.zeros(len(index.hashes), dtype=np.int64)
        for path in self.folder.glob("counts_*.npy"):
            found, counts = np.load(path)
            total[found] += counts
        index = index.without(total > self.common_documents)
        with self.exclusion_writer as writer:
            for document in data:
                spans = index.find(document.text)[1]
                if not len(spans):
                    yield document
                    continue
                pieces = cut(document.text, spans)
                self.stat_update("documents_cut" if pieces else "dropped_contaminated")
                first = document.text[max(0, spans[0][0] - WINDOW) : spans[0][1] + WINDOW]
                writer.write(Document(first, document.id, metadata={"filter_reason": "contaminated"}), rank)
                for number, piece in enumerate(pieces):
                    yield Document(piece, f"{document.id}/{number}", metadata=document.metadata)
