"""Show what is in data folders: sources, document lengths, bytes per token, and documents as text.

python -m data_prep.inspect data/quickstart
python -m data_prep.inspect data/web data/books --documents 0
python -m data_prep.inspect data/quickstart --run runs/quickstart --sequences 592:608
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from data_prep.common.command_line import ArgumentParser, UserError, first_line, redact, run
from data_prep.common.hub import local_folder
from data_prep.common.schema import STRICT, Count, Positive, read_yaml, validate
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.order import shares_of, training_order
from data_prep.sharding.shards import open_shard, token_documents
from data_prep.tokenization.byte_level import bytes_of_tokens
from data_prep.tokenization.tokenizer import hf_tokenizer

_BAR, _EXCERPT = 40, 400
_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class _OrderSettings:
    """Settings of a run that determine the order of its data."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}

    data: list[str]
    n_positions: Positive
    order: Literal["shuffled", "sequential"]
    seed: Count
    sequence_length: Positive | None = None
    data_weights: list[Annotated[float, Field(gt=0)]] | None = None


@dataclass
class Statistics:
    """Counts over all shards of a folder.

    Attributes:
        text_bytes: of the decoded documents.
        lengths: number of documents by length in tokens: element k has those from 2^k to 2^(k+1) - 1.
    """

    tokens: int
    documents: int
    text_bytes: int
    lengths: np.ndarray


def statistics(folder: Path, manifest: Manifest) -> Statistics:
    """Counts tokens, documents and bytes, with one shard in memory at a time."""
    sizes = bytes_of_tokens(hf_tokenizer(folder / "tokenizer"))
    counts = np.zeros(len(sizes), dtype=np.int64)
    lengths = np.zeros(33, dtype=np.int64)
    for split in ("val", "train"):
        paths = [folder / shard.file for shard in manifest.shards if shard.split == split]
        for document in token_documents(paths, manifest.tokenizer.eos_token_id):
            lengths[len(document).bit_length() - 1] += 1
    for shard in manifest.shards:
        tokens = open_shard(folder / shard.file)
        for start in range(0, len(tokens), _CHUNK_TOKENS):  # bincount converts to int64
            found = np.bincount(tokens[start : start + _CHUNK_TOKENS], minlength=len(counts))
            if len(found) > len(counts):
                raise UserError(f"{folder / shard.file}: ids beyond the vocabulary; run python -m data_prep.verify")
            counts += found
    return Statistics(int(counts.sum()), int(lengths.sum()), int(counts @ sizes), lengths)


def histogram(lengths: np.ndarray) -> str:
    """Formats `Statistics.lengths`, one line with a bar for each power of two."""
    used = np.flatnonzero(lengths)
    lines = []
    for k in range(used[0], used[-1] + 1):
        bar = "#" * round(_BAR * lengths[k] / lengths.max())
        lines.append(f"  {2**k:>10,} to {2 ** (k + 1) - 1:>10,}  {lengths[k]:>12,}  {bar}")
    return "\n".join(lines)


def sample(folder: Path, manifest: Manifest, split: str, count: int, seed: int) -> Iterator[str]:
    """Decodes `count` random documents of a split, each up to the end of its shard; cuts long texts."""
    tokenizer = hf_tokenizer(folder / "tokenizer")
    shards = [shard for shard in manifest.shards if shard.split == split and shard.documents]
    rng = np.random.default_rng(seed)
    for number in rng.integers(sum(shard.documents for shard in shards), size=count):
        for shard in shards:  # the shard in which document `number` begins
            if number < shard.documents:
                break
            number -= shard.documents
        tokens = open_shard(folder / shard.file)
        starts = np.flatnonzero(tokens == manifest.tokenizer.eos_token_id)
        document = tokens[starts[number] : starts[number + 1] if number + 1 < len(starts) else None]
        text = tokenizer.decode(document[1:].tolist())
        shown = text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]} ..."
        yield f"--- {shard.file}, document {number + 1}, {len(document):,} tokens\n{shown}"


def sequences(names: list[str], run_folder: Path, first: int, stop: int) -> Iterator[str]:
    """Decodes the training sequences at positions `first` to before `stop` of a run on these folders (`UserError` for a
    folder that is not a run's, and for a run on other data)."""
    config = run_folder / "config.yaml"
    try:
        settings = validate(read_yaml(config), _OrderSettings, str(config))
    except (FileNotFoundError, UserError) as error:
        raise UserError(f"{run_folder}: not the folder of a run ({first_line(error)})") from error
    if [Path(name).name for name in settings.data] != [Path(name).name for name in names]:
        raise UserError(f"{run_folder} is a run on {' '.join(settings.data)}; name the same folders, in that order")
    folders = list(map(local_folder, names))
    manifests = [Manifest.read(folder) for folder in folders]
    shares, length = shares_of(manifests, settings.data_weights), settings.sequence_length or settings.n_positions
    mixture = training_order(folders, manifests, shares, "train", settings.order, settings.seed, length)
    tokenizer = hf_tokenizer(folders[0] / "tokenizer")
    for position in range(first, stop):
        yield f"--- sequence {position}\n{tokenizer.decode(mixture.read(position)[:-1].tolist())}"


def _range(word: str) -> tuple[int, int]:
    first, _, stop = word.partition(":")
    return int(first), int(stop or int(first) + 1)


def main() -> None:
    parser = ArgumentParser("python -m data_prep.inspect", __doc__)
    parser.add_argument("folders", nargs="+", help="data folders, or hf://datasets/USER/NAME")
    parser.add_option("documents", type=int, default=3, help="to show of each folder")
    parser.add_option("split", choices=["train", "val"], default="train", help="to show documents of")
    parser.add_option("seed", type=int, default=0, help="of the choice of documents")
    parser.add_option("sequences", type=_range, metavar="FIRST:STOP", help="show these training sequences instead")
    parser.add_option("run", type=Path, help="folder of the run whose sequences they are")
    args = parser.parse_args()
    if (args.sequences is None) != (args.run is None):
        raise UserError("sequences are those of a run: give --sequences and --run together")
    if args.sequences is not None:
        for text in sequences(args.folders, args.run, *args.sequences):
            print(text)
        return
    if args.documents < 0 or args.seed < 0:
        raise UserError(f"documents={args.documents} and seed={args.seed} must be at least 0")
    manifests = {folder: Manifest.read(folder) for folder in map(local_folder, args.folders)}
    total = sum(shard.tokens for manifest in manifests.values() for shard in manifest.shards)
    for folder, manifest in manifests.items():
        found = statistics(folder, manifest)
        print(
            f"{folder}\n"
            f"source      {redact(manifest.source.source)}\n"
            f"tokenizer   {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids, {manifest.dtype}\n"
            f"tokens      {found.tokens:,} ({found.tokens / total:.1%} of all shown): "
            f"{manifest.tokens('train'):,} for training, {manifest.tokens('val'):,} for validation, "
            f"in {len(manifest.shards)} shards\n"
            f"documents   {found.documents:,}, {found.tokens / found.documents:,.0f} tokens each\n"
            f"fertility   {found.text_bytes / (found.tokens - found.documents):.3f} bytes per token\n"
            f"cleaning    {', '.join(step.step for step in manifest.cleaning) or 'none'}\n"
            f"lengths in tokens, documents\n{histogram(found.lengths)}"
        )
        for text in sample(folder, manifest, args.split, args.documents, args.seed):
            print(text)
        print()


if __name__ == "__main__":
    run(main)
