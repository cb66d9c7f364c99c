"""Show what is in data folders: sources, document lengths, bytes per token, and documents as text.

python -m data_prep.inspect data/quickstart
python -m data_prep.inspect data/quickstart --run runs/quickstart --sequences 592:608
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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

_BAR = 40
_EXCERPT = 120  # tokens of a document
# Backgrounds of neighbouring tokens, in a terminal of 256 colours; the text is black.
_BACKGROUNDS = (153, 157, 222, 217, 189, 194)


@dataclass(frozen=True)
class _RunSettings:
    """Settings of a run that determine its data order."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}

    data: list[str]
    n_positions: Positive
    order: Literal["shuffled", "sequential"]
    seed: Count
    sequence_length: Positive | None = None
    data_weights: list[Annotated[float, Field(gt=0)]] | None = None


def measure(folder: Path, manifest: Manifest) -> tuple[int | None, np.ndarray]:
    """Text size in bytes (None if neither the tokens nor the manifest tell it), and document counts by length: element
    k counts documents with 2^k to 2^(k+1) - 1 tokens."""
    sizes, text_bytes = bytes_of_tokens(hf_tokenizer(folder / "tokenizer")), 0
    lengths = np.zeros(33, dtype=np.int64)
    for split in ("val", "train"):
        paths = [folder / shard.file for shard in manifest.shards if shard.split == split]
        for document in token_documents(paths, manifest.tokenizer.eos_token_id):
            lengths[len(document).bit_length() - 1] += 1
            if sizes is not None and document.max() >= len(sizes):
                raise UserError(f"{folder}: ids beyond the vocabulary; run python -m data_prep.verify")
            text_bytes += 0 if sizes is None else int(sizes[document].sum())
    return manifest.text_bytes("train", "val") if sizes is None else text_bytes, lengths


def summary(folder: Path, manifest: Manifest, total: int) -> str:
    """Summarizes a folder: its numbers, its share of `total` tokens, and an example of what each cleaning step
    dropped."""
    tokens, documents = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("tokens", "documents"))
    text_bytes, lengths = measure(folder, manifest)
    fertility = "not available" if text_bytes is None else f"{text_bytes / (tokens - documents):.3f} bytes per token"
    lines = [
        f"{folder}",
        f"source      {redact(manifest.source.source)}",
        f"tokenizer   {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids, {manifest.dtype}",
        f"tokens      {tokens:,} ({tokens / total:.1%} of all shown): {manifest.tokens('train'):,} for training, "
        f"{manifest.tokens('val'):,} for validation, in {len(manifest.shards)} shards",
        f"documents   {documents:,}, {tokens / documents:,.0f} tokens each",
        f"fertility   {fertility}",
        f"cleaning    {', '.join(step.step for step in manifest.cleaning) or 'none'}",
    ]
    for step in manifest.cleaning:
        for reason, text in step.examples.items():
            lines.append(f"dropped     {step.dropped.get(reason, 0):,} by {step.step}, {reason}; for example: {text!r}")
    lines.append("lengths in tokens, documents")
    used = np.flatnonzero(lengths)
    for k in range(used[0], used[-1] + 1):
        bar = "#" * round(_BAR * lengths[k] / lengths.max())
        lines.append(f"  {2**k:>10,} to {2 ** (k + 1) - 1:>10,}  {lengths[k]:>12,}  {bar}")
    return "\n".join(lines)


def sample(folder: Path, manifest: Manifest, split: str, count: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and token ids of `count` random documents of a split, each up to the end of its shard."""
    shards = [shard for shard in manifest.shards if shard.split == split and shard.documents]
    rng = np.random.default_rng(seed)
    for number in rng.integers(sum(shard.documents for shard in shards), size=count):
        for shard in shards:  # the shard in which document `number` begins
            if number < shard.documents:
                break
            number -= shard.documents
        tokens = open_shard(folder / shard.file)
        starts = [*np.flatnonzero(tokens == manifest.tokenizer.eos_token_id), len(tokens)]
        document = tokens[starts[number] : starts[number + 1]]
        yield f"{shard.file}, document {number + 1}, {len(document):,} tokens", document[1:]


def sequences(names: list[str], run_folder: Path, first: int, stop: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and token ids of the training sequences at positions `first` to before `stop` (`UserError` if the folder is
    not a run, or was trained on other data)."""
    config = run_folder / "config.yaml"
    try:
        settings = validate(read_yaml(config), _RunSettings, str(config))
    except (FileNotFoundError, UserError) as error:
        raise UserError(f"{run_folder}: not the folder of a run ({first_line(error)})") from error
    if [Path(name).name for name in settings.data] != [Path(name).name for name in names]:
        raise UserError(f"{run_folder} is a run on {' '.join(settings.data)}; name the same folders, in that order")
    folders = list(map(local_folder, names))
    manifests = [Manifest.read(folder) for folder in folders]
    shares, length = shares_of(manifests, settings.data_weights), settings.sequence_length or settings.n_positions
    mixture = training_order(folders, manifests, shares, "train", settings.order, settings.seed, length)
    for position in range(first, stop):
        yield f"sequence {position}", mixture.read(position)[:-1]


def shown(tokenizer: Any, ids: np.ndarray, color: bool) -> str:
    """Renders tokens as text for a terminal; with `color`, neighbouring tokens differ in background."""
    if not color:
        return tokenizer.decode(ids.tolist())
    pieces = (tokenizer.decode([number]).replace("\n", "⏎\n") for number in ids.tolist())
    return "".join(
        f"\033[30;48;5;{background}m{piece}\033[0m"
        for piece, background in zip(pieces, itertools.cycle(_BACKGROUNDS), strict=False)
    )


def _range(word: str) -> tuple[int, int]:
    first, _, stop = word.partition(":")
    return int(first), int(stop or int(first) + 1)


def main() -> None:
    parser = ArgumentParser("python -m data_prep.inspect", __doc__)
    parser.add_argument("folders", nargs="+", help="data folders, or hf://datasets/USER/NAME")
    parser.add_option("documents", type=int, default=3, help="to show of each folder")
    parser.add_option("split", choices=["train", "val"], default="train", help="to show documents of")
    parser.add_option("seed", type=int, default=0, help="of the choice of documents")
    colors = ["auto", "always", "never"]
    parser.add_option("color", choices=colors, default="auto", help="of tokens; auto: on a terminal")
    parser.add_option("sequences", type=_range, metavar="FIRST:STOP", help="show these training sequences instead")
    parser.add_option("run", type=Path, help="folder of the run whose sequences they are")
    args = parser.parse_args()
    if (args.sequences is None) != (args.run is None):
        raise UserError("sequences are those of a run: give --sequences and --run together")
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    if args.sequences is not None:
        excerpts = sequences(args.folders, args.run, *args.sequences)
        tokenizer = hf_tokenizer(local_folder(args.folders[0]) / "tokenizer")
        for title, ids in excerpts:
            print(f"--- {title}\n{shown(tokenizer, ids, color)}")
        return
    if args.documents < 0 or args.seed < 0:
        raise UserError(f"documents={args.documents} and seed={args.seed} must be at least 0")
    manifests = {folder: Manifest.read(folder) for folder in map(local_folder, args.folders)}
    total = sum(shard.tokens for manifest in manifests.values() for shard in manifest.shards)
    for folder, manifest in manifests.items():
        print(summary(folder, manifest, total))
        tokenizer = hf_tokenizer(folder / "tokenizer")
        for title, ids in sample(folder, manifest, args.split, args.documents, args.seed):
            more = " ..." if len(ids) > _EXCERPT else ""
            print(f"--- {title}\n{shown(tokenizer, ids[:_EXCERPT], color)}{more}")
        print()


if __name__ == "__main__":
    run(main)
