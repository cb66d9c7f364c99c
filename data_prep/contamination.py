"""Report which evaluation items are in the finished shards of a data folder.

python -m data_prep.contamination data/fineweb-edu --against hellaswag_val.jsonl

The folder's `contamination.json` keeps it, for the report of a run on this data.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.cleaning.decontamination import COMMON_DOCUMENTS, NGRAM, SHORTEST_NGRAM, Index, ngram_length, split_words
from data_prep.cleaning.evaluation_sets import read_items
from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import write_text
from data_prep.common.hub import local_folder
from data_prep.common.schema import STRICT, Count, Positive, Sha256, read_json
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.shards import open_shard

FILE_NAME = "contamination.json"
EXAMPLES = 5
_CHUNK_TOKENS, _BATCH_DOCUMENTS = 2**20, 256


@dataclass(frozen=True)
class Contamination:
    """What of one evaluation set is in the data.

    Attributes:
        file: the evaluation set.
        ngram: the words of its n-grams; a shorter item is looked for as a whole.
        items, short_items: how many it has, and how many are too short to tell.
        found_items: those with at least one n-gram in the data.
        ngrams, found_ngrams, common_ngrams: how many it has, how many are in the data, and how many in so many
            documents (more than `COMMON_DOCUMENTS`) that they are taken for common phrases and not for found.
        documents: those of the data with at least one found n-gram.
        examples: of the items found, those in the most documents: number, text of an n-gram, documents.
    """

    __pydantic_config__ = STRICT

    file: str
    ngram: Positive
    items: Count
    short_items: Count
    found_items: Count
    ngrams: Count
    found_ngrams: Count
    common_ngrams: Count
    documents: Count
    examples: list[tuple[Count, str, Count]]

    def __str__(self) -> str:
        share = self.found_items / max(self.items, 1)
        lines = [
            f"{self.file}: {self.found_items:,} of {self.items:,} items found ({share:.2%}), by "
            f"{self.found_ngrams:,} of {self.ngrams:,} {self.ngram}-grams, in {self.documents:,} documents"
        ]
        if self.common_ngrams:
            lines.append(f"  {self.common_ngrams:,} more are in over {COMMON_DOCUMENTS} documents: common phrases")
        if self.short_items:
            lines.append(f"  {self.short_items:,} items have fewer than {SHORTEST_NGRAM} words, too few to tell")
        return "\n".join(lines + [f"  {n:>4} documents, item {item}: {text!r}" for item, text, n in self.examples])


@dataclass(frozen=True)
class _Record:
    """The contents of `contamination.json`; `shards_sha256` is that of the shards that were searched."""

    __pydantic_config__ = STRICT

    shards_sha256: Sha256
    sets: list[Contamination]


@dataclass
class _Search:
    """One evaluation set, and what has been seen of it; memory is bounded by the size of the set.

    `counts`, `[n-grams]`, is in how many documents each n-gram is. `seen` has the places in it of each document's
    n-grams, but for those that are common by then.
    """

    path: Path
    items: list[list[str]]
    short_items: int
    ngram: int
    index: Index
    counts: np.ndarray
    seen: list[np.ndarray]

    @classmethod
    def of(cls, path: Path, fields: list[str] | None) -> "_Search":
        items = list(read_items(path, fields))
        if not items:
            raise UserError(f"evaluation set {path}: there is nothing in it")
        words = [_words(item) for item in items]
        ngram = item_ngram(words)
        index = Index.build((text for item in items for text in item), ngram)
        short = sum(ngram_length(count, ngram) is None for count in words)
        return cls(path, items, short, ngram, index, np.zeros(len(index.hashes), dtype=np.int64), [])

    def look_into(self, document: str) -> None:
        places = np.unique(self.index.find(document)[0])
        self.counts[places] += 1
        if len(places := places[self.counts[places] <= COMMON_DOCUMENTS]):
            self.seen.append(places)

    def result(self) -> Contamination:
        found = (self.counts > 0) & (self.counts <= COMMON_DOCUMENTS)
        examples = []
        for number, item in enumerate(self.items if found.any() else [], start=1):
            if hits := [hit for text in item for hit in self._hits(text, found)]:
                documents, ngram = max(hits, key=lambda hit: hit[0])
                examples.append((number, ngram, documents))
        return Contamination(
            file=str(self.path),
            ngram=self.ngram,
            items=len(self.items),
            short_items=self.short_items,
            found_items=len(examples),
            ngrams=len(found),
            found_ngrams=int(found.sum()),
            common_ngrams=int((self.counts > COMMON_DOCUMENTS).sum()),
            documents=sum(bool(found[places].any()) for places in self.seen),
            examples=sorted(examples, key=lambda example: -example[2])[:EXAMPLES],
        )

    def _hits(self, text: str, found: np.ndarray) -> list[tuple[int, str]]:
        """The found n-grams of an item's text, and in how many documents each is."""
        places, spans = self.index.find(text)
        chosen = found[places]
        counts = self.counts[places[chosen]].tolist()
        return [(count, text[first:last]) for count, (first, last) in zip(counts, spans[chosen].tolist(), strict=True)]


def _words(item: list[str]) -> int:
    return len(split_words(max(item, key=len, default="")).hashes)


def item_ngram(words: list[int]) -> int:
    """The n-gram that a set is searched by, from the `words` of its items: their 5th percentile, within 8 and 13.

    Appendix C of GPT-3's paper (arXiv:2005.14165), "N". The training data itself is cleaned by 13-grams always.
    """
    return int(np.clip(np.percentile(words, 5), SHORTEST_NGRAM, NGRAM))


def contamination(folder: Path, against: list[Path], fields: list[str] | None = None) -> list[Contamination]:
    """Look for each of the evaluation sets in all documents of a data folder, those of validation too.

    Raises:
        UserError: for a folder or an evaluation set that cannot be read.
    """
    manifest = Manifest.read(folder)
    searches = [_Search.of(path, fields) for path in against]
    for document in documents(folder, manifest):
        for search in searches:
            search.look_into(document)
    return [search.result() for search in searches]


def record(folder: Path, found: list[Contamination]) -> None:
    """Write what was found to `contamination.json` of the data folder, beside what was found of other sets before."""
    kept = [
        one
        for one in recorded(folder) or []
        if Path(one.file).resolve() not in {Path(new.file).resolve() for new in found}
    ]
    content = _Record(Manifest.read(folder).shards_sha256, [*kept, *found])
    write_text(folder / FILE_NAME, json.dumps(asdict(content), indent=2) + "\n")


def recorded(folder: Path) -> list[Contamination] | None:
    """What was found in the shards that `folder` has now, by evaluation set; None if they were not searched."""
    path = folder / FILE_NAME
    try:
        content = read_json(path, _Record)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}: not what data_prep.contamination writes; remove it") from error
    return content.sets if content.shards_sha256 == Manifest.read(folder).shards_sha256 else None


def documents(folder: Path, manifest: Manifest) -> Iterator[str]:
    """The text of each document of a data folder, in order, whether or not it lies in one shard."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    for batch in _batches(_token_documents(folder, manifest)):
        yield from tokenizer.decode_batch([tokens.tolist() for tokens in batch])


def _batches(documents: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        yield batch


def _token_documents(folder: Path, manifest: Manifest) -> Iterator[np.ndarray]:
    parts: list[np.ndarray] = []
    for shard in manifest.shards:
        tokens = open_shard(folder / shard.file)
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = tokens[start : start + _CHUNK_TOKENS]
            first, *others = np.split(chunk, np.flatnonzero(chunk == manifest.tokenizer.eos_token_id))
            parts.append(first)
            for part in others:
                # Before the first document there is nothing.
                if any(map(len, parts)):
                    yield np.concatenate(parts)
                parts = [part]
    yield np.concatenate(parts)


def main() -> None:
    parser = ArgumentParser("python -m data_prep.contamination", __doc__)
    parser.add_argument("folder", type=local_folder, help="data folder, as data_prep.prepare makes it")
    parser.add_option("against", type=Path, nargs="+", required=True, metavar="FILE", help="sets: .jsonl, .txt")
    parser.add_option("fields", nargs="+", help="of a record that make up an item; HellaSwag's, or every string")
    args = parser.parse_args()
    recorded(args.folder)  # before the search, which takes its time, what is there is known to be readable
    found = contamination(args.folder, args.against, args.fields)
    print("\n".join(map(str, found)))
    record(args.folder, found)


if __name__ == "__main__":
    run(main)
