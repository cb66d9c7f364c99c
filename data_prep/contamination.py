"""Report which evaluation items are in the finished shards of a data folder.

python -m data_prep.contamination data/fineweb-edu --against hellaswag_val.jsonl

The folder's `contamination.json` keeps the result, for the report of a run on this data.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.cleaning.decontamination import COMMON_DOCUMENTS, NGRAM, SHORTEST_NGRAM, Index, read_items, split_words
from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import write_text
from data_prep.common.hub import local_folder
from data_prep.common.schema import STRICT, Count, Positive, Sha256, read_json
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.shards import token_documents

FILE_NAME = "contamination.json"
EXAMPLES = 5
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Contamination:
    """Items of one evaluation set found in the data.

    Attributes:
        file: the evaluation set.
        ngram: number of words of its n-grams; shorter items are searched as a whole.
        items, short_items: number of items, and of those too short to tell.
        found_items: number of items with at least one n-gram in the data.
        ngrams, found_ngrams, common_ngrams: number of n-grams, of those in the data, and of common phrases: those in
            more than `COMMON_DOCUMENTS` documents, which do not count as found.
        documents: number of documents of the data with at least one found n-gram.
        examples: of the found items in the most documents: number, text of an n-gram, documents.
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
    """The contents of `contamination.json`; `shards_sha256` is that of the searched shards."""

    __pydantic_config__ = STRICT

    shards_sha256: Sha256
    sets: list[Contamination]


class _Search:
    """Search for one evaluation set; its memory is bounded by the size of the set.

    Attributes:
        counts: number of documents with each n-gram, `[n-grams]`.
        seen: for each document, the indices of its n-grams, except for those that are common by then.
    """

    def __init__(self, path: Path, fields: list[str] | None) -> None:
        self.path, self.items = path, list(read_items(path, fields))
        if not self.items:
            raise UserError(f"evaluation set {path}: there is nothing in it")
        words = [len(split_words(max(item, key=len, default=""))) for item in self.items]
        self.ngram = item_ngram(words)
        self.short_items = sum(count < SHORTEST_NGRAM for count in words)
        self.index = Index.build(itertools.chain.from_iterable(self.items), self.ngram)
        self.counts = np.zeros(len(self.index.hashes), dtype=np.int64)
        self.seen: list[np.ndarray] = []

    def add(self, document: str) -> None:
        indices = np.unique(self.index.find(document)[0])
        self.counts[indices] += 1
        if len(indices := indices[self.counts[indices] <= COMMON_DOCUMENTS]):
            self.seen.append(indices)

    def result(self) -> Contamination:
        common = self.counts > COMMON_DOCUMENTS
        found = (self.counts > 0) & ~common
        examples = []
        for number, item in enumerate(self.items if found.any() else [], start=1):
            places = [(text, *place) for text in item for place in zip(*self.index.find(text), strict=True)]
            hits = [(int(self.counts[i]), text[first:last]) for text, i, (first, last) in places if found[i]]
            if hits:
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
            common_ngrams=int(common.sum()),
            documents=sum(bool(found[indices].any()) for indices in self.seen),
            examples=sorted(examples, key=lambda example: -example[2])[:EXAMPLES],
        )


def item_ngram(words: list[int]) -> int:
    """N-gram length for items with these word counts: their 5th percentile, clamped to 8..13.

    Appendix C of GPT-3's paper (arXiv:2005.14165), "N". The training data itself is always cleaned by 13-grams.
    """
    return int(np.clip(np.percentile(words, 5), SHORTEST_NGRAM, NGRAM))


def contamination(folder: Path, against: list[Path], fields: list[str] | None = None) -> list[Contamination]:
    """Searches all documents of a data folder, including validation, for evaluation sets (`UserError` if either cannot
    be read)."""
    manifest = Manifest.read(folder)
    searches = [_Search(path, fields) for path in against]
    for document in documents(folder, manifest):
        for search in searches:
            search.add(document)
    return [search.result() for search in searches]


def record(folder: Path, found: list[Contamination]) -> None:
    """Writes results to the data folder's `contamination.json`, keeping those of other sets."""
    new = {Path(one.file).resolve() for one in found}
    kept = [one for one in recorded(folder) or [] if Path(one.file).resolve() not in new]
    content = _Record(Manifest.read(folder).shards_sha256, [*kept, *found])
    write_text(folder / FILE_NAME, json.dumps(asdict(content), indent=2) + "\n")


def recorded(folder: Path) -> list[Contamination] | None:
    """Recorded results for the current shards of `folder`, one per evaluation set; None if they were not searched."""
    try:
        content = read_json(folder / FILE_NAME, _Record)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}: not what data_prep.contamination writes; remove it") from error
    return content.sets if content.shards_sha256 == Manifest.read(folder).shards_sha256 else None


def documents(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Texts of the documents of a data folder, in order; a document may cross shards."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    found = token_documents([folder / shard.file for shard in manifest.shards], manifest.tokenizer.eos_token_id)
    while batch := list(itertools.islice(found, _BATCH_DOCUMENTS)):
        yield from tokenizer.decode_batch([tokens.tolist() for tokens in batch])


def main() -> None:
    parser = ArgumentParser("python -m data_prep.contamination", __doc__)
    parser.add_argument("folder", type=local_folder, help="data folder, as data_prep.prepare makes it")
    parser.add_option("against", type=Path, nargs="+", required=True, metavar="FILE", help="sets: .jsonl, .txt")
    parser.add_option("fields", nargs="+", help="of a record that make up an item; HellaSwag's, or every string")
    args = parser.parse_args()
    recorded(args.folder)  # an unreadable record is reported before the long search
    found = contamination(args.folder, args.against, args.fields)
    print("\n".join(map(str, found)))
    record(args.folder, found)


if __name__ == "__main__":
    run(main)
