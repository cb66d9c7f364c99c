"""Turn documents into a data folder: token shards, `manifest.json` and `tokenizer/`.

python -m data_prep.prepare data/shakespeare --source shakespeare.txt
python -m data_prep.prepare data/fineweb-edu --source HuggingFaceFW/fineweb-edu --name sample-10BT

Killed at any moment, the same command goes on from the last finished shard and writes the same bytes.
"""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import partial_name
from data_prep.common.locks import LOCK_NAME, locked
from data_prep.common.records import Position
from data_prep.reading.sources import Corpus, Source
from data_prep.sharding.manifest import ADOPTED, FILE_NAME, Manifest
from data_prep.sharding.shards import FORMATS, smallest_dtype
from data_prep.sharding.writer import Writer, remove_files
from data_prep.tokenization.tokenizer import (
    Tokenizer,
    describe_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

SHARD_TOKENS = 100_000_000
_BYTES_PER_TOKEN, _SHARDS_OF_A_SMALL_CORPUS = 4, 20


@dataclass(frozen=True)
class Recipe:
    """All that decides what a data folder holds.

    Attributes:
        source: where the documents come from.
        tokenizer: `gpt2`; `bpe` for one trained on the corpus; or a folder or name that `AutoTokenizer` loads.
        vocab_size: of a trained tokenizer.
        shard_tokens: tokens in a shard; None for 100M, or a twentieth of a smaller local corpus.
        val_shards: how many of the first shards are validation.
        dtype: `uint16` or `uint32`; None for the smaller one that holds the vocabulary.
        format: `npy`, or `bin` for that of llm.c.
    """

    source: Source
    tokenizer: str = "gpt2"
    vocab_size: int = 4096
    shard_tokens: int | None = None
    val_shards: int = 1
    dtype: str | None = None
    format: str = "npy"


def prepare(recipe: Recipe, folder: Path, workers: int | None = None) -> Manifest:
    """Make `folder` as `recipe` says, or finish it. The result is the same for any number of `workers`: threads that
    tokenize, one for each core by default.

    A finished folder is returned if it was made by the same recipe.

    Raises:
        UserError: for whatever the user can mend. Finished shards are kept; where there are none, nothing is left.
    """
    try:
        has_manifest = (folder / FILE_NAME).exists()
        if not has_manifest and folder.exists() and set(os.listdir(folder)) - {partial_name(FILE_NAME), LOCK_NAME}:
            raise UserError(f"{folder} exists and is not a data folder (no {FILE_NAME}); choose another name")
        if has_manifest and (manifest := Manifest.load(folder)).unfinished is None:
            _check_same(recipe, folder, manifest)
            return Manifest.read(folder)
        with locked(folder):
            return _prepare(recipe, folder, workers or _cores())
    except OSError as error:
        raise UserError(f"{folder}: {error}") from error
    finally:
        with suppress(OSError):  # the empty folder of a preparation that could not begin
            folder.rmdir()


def _prepare(recipe: Recipe, folder: Path, workers: int) -> Manifest:
    manifest = Manifest.load(folder) if (folder / FILE_NAME).exists() else None
    if manifest is not None and manifest.shards:
        corpus = _check_same(recipe, folder, manifest)
        if problems := manifest.problems(folder):
            raise UserError(f"{problems[0]}; {manifest.remedy}")
        return Writer(folder, manifest).write(corpus, load_tokenizer(folder / "tokenizer"), workers)
    if manifest is not None:
        remove_files(folder)  # of a preparation that was killed in its first shard
    writer = None
    try:
        corpus = recipe.source.resolve()
        tokenizer, manifest = _begin(recipe, corpus, folder)
        writer = Writer(folder, manifest)
        return writer.write(corpus, tokenizer, workers)
    except BaseException:
        if writer is None or not writer.manifest.shards:
            remove_files(folder)
        raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_same(recipe: Recipe, folder: Path, manifest: Manifest) -> Corpus | None:
    """Refuse a folder that another recipe has made; the corpus to go on with, if there is anything left to do."""
    trained = {"gpt2": "gpt2", "bpe": f"bpe-{recipe.vocab_size}"}
    wanted = {
        **recipe.source.describe(),
        "tokenizer": trained.get(recipe.tokenizer, recipe.tokenizer),
        "shard_tokens": manifest.shard_tokens if recipe.shard_tokens is None else recipe.shard_tokens,
        "val_shards": recipe.val_shards,
        "dtype": recipe.dtype or manifest.dtype,
        "format": recipe.format,
    }
    found = {**asdict(manifest.source), "tokenizer": manifest.tokenizer.name}
    found |= {name: getattr(manifest, name) for name in ("shard_tokens", "val_shards", "dtype", "format")}
    _refuse_difference(folder, wanted, found)
    commit = manifest.source.commit
    if commit and manifest.unfinished is None:
        return None  # all that there is to know about what has been read; no need for the network
    corpus = recipe.source.resolve(commit)
    _refuse_difference(folder, asdict(corpus.describe()), found)
    return corpus


def _refuse_difference(folder: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    if different := [key for key in wanted if wanted[key] != found.get(key)]:
        details = ", ".join(f"{key}={found.get(key)!r} (now: {wanted[key]!r})" for key in different)
        raise UserError(f"{folder} was made with {details}; choose another folder, or remove this one")


def _tokenizer(recipe: Recipe, corpus: Corpus) -> Tokenizer:
    if recipe.tokenizer == "gpt2":
        return gpt2_tokenizer()
    if recipe.tokenizer != "bpe":
        return load_tokenizer(recipe.tokenizer)
    if not corpus.is_local:
        raise UserError("a tokenizer is trained on local text only, not on a stream; use --tokenizer gpt2")
    return train_tokenizer(corpus.documents(), recipe.vocab_size)


def _default_shard_tokens(corpus: Corpus) -> int:
    if not corpus.is_local:
        return SHARD_TOKENS
    return min(SHARD_TOKENS, max(1, corpus.bytes // (_BYTES_PER_TOKEN * _SHARDS_OF_A_SMALL_CORPUS)))


def _begin(recipe: Recipe, corpus: Corpus, folder: Path) -> tuple[Tokenizer, Manifest]:
    """Check what can be checked, claim the folder by a manifest without shards, and make the tokenizer."""
    shard_tokens = _default_shard_tokens(corpus) if recipe.shard_tokens is None else recipe.shard_tokens
    for name, value in (("shard_tokens", shard_tokens), ("val_shards", recipe.val_shards)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    manifest = Manifest(
        source=corpus.describe(),
        tokenizer=None,
        format=recipe.format,
        dtype=None,
        shard_tokens=shard_tokens,
        val_shards=recipe.val_shards,
        cleaning=corpus.cleaning(),
        unfinished=Position(),
    )
    manifest.write(folder)
    tokenizer = _tokenizer(recipe, corpus)
    dtype = recipe.dtype or smallest_dtype(tokenizer.vocab_size)
    if tokenizer.vocab_size - 1 > np.iinfo(dtype).max:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, {dtype} holds {np.iinfo(dtype).max + 1}; use dtype uint32"
        )
    manifest = replace(
        manifest, tokenizer=describe_tokenizer(tokenizer, tokenizer.save(folder / "tokenizer")), dtype=dtype
    )
    manifest.write(folder)
    return tokenizer, manifest


def preparing_command(folder: str, manifest: Manifest) -> list[str]:
    """The words of the command that makes a folder with this manifest, less `python -m`; none for adopted shards."""
    source, name = manifest.source, manifest.tokenizer.name
    if source.source == ADOPTED:
        return []
    tokenizer = ["bpe", "--vocab_size", str(manifest.tokenizer.vocab_size)] if name.startswith("bpe-") else [name]
    words = ["data_prep.prepare", folder, "--source", source.source, "--tokenizer", *tokenizer]
    for option, value in {"name": source.name, "revision": source.commit or source.revision}.items():
        words += [f"--{option}", value] if value else []
    for option, default in {"split": "train", "text_column": "text"}.items():
        words += [f"--{option}", getattr(source, option)] if getattr(source, option) != default else []
    words += [word for condition in source.where for word in ("--where", condition)]
    words += ["--shard_tokens", str(manifest.shard_tokens), "--val_shards", str(manifest.val_shards)]
    return [*words, "--dtype", manifest.dtype, "--format", manifest.format]


def main() -> None:
    parser = ArgumentParser("python -m data_prep.prepare", __doc__)
    parser.add_argument("folder", type=Path, help="data folder to make, or to go on with")
    parser.add_option(
        "source",
        required=True,
        help="'builtin' (the Python standard library's sources); a file, folder or glob of .parquet, .jsonl or .txt "
        "(those two also .gz, .zst), local or as s3://, gs://, https://, ...; or a data set of the Hub, streamed",
    )
    parser.add_option("name", help="configuration of the Hub data set, as in 'sample-10BT'")
    parser.add_option("split", default="train", help="split of the Hub data set")
    parser.add_option("revision", help="branch, tag or commit of the Hub data set")
    parser.add_option("text_column", default="text", help="field of a record that holds the text")
    parser.add_option(
        "where",
        action="append",
        default=[],
        help="keep records of which this holds, as in 'int_score >= 3'; repeatable",
    )
    parser.add_option(
        "tokenizer",
        default="gpt2",
        help="'gpt2'; 'bpe' for one trained on the text; or a folder or name that AutoTokenizer loads",
    )
    parser.add_option("vocab_size", type=int, default=4096, help="tokens of a trained tokenizer, end of text included")
    parser.add_option(
        "shard_tokens", type=int, help="tokens in a shard; 100M by default, or a twentieth of a smaller local corpus"
    )
    parser.add_option("val_shards", type=int, default=1, help="how many of the first shards are validation")
    parser.add_option(
        "dtype", choices=["uint16", "uint32"], help="by default the smaller one that holds the vocabulary"
    )
    parser.add_option("format", choices=FORMATS, default="npy", help="of the shards; bin is llm.c's")
    parser.add_option(
        "workers",
        type=int,
        help="tokenizing threads, by default one for each core; what tiktoken cannot run takes all cores anyway",
    )
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        raise UserError(f"workers={args.workers} must be at least 1")
    source = Source(args.source, args.name, args.split, args.revision, args.text_column, tuple(args.where))
    recipe = Recipe(
        source, args.tokenizer, args.vocab_size, args.shard_tokens, args.val_shards, args.dtype, args.format
    )
    manifest = prepare(recipe, args.folder, args.workers)
    if manifest.dropped_tokens:
        print(
            f"dropped {manifest.dropped_tokens:,} tokens: the rest of the document that validation ends in, which "
            f"training must not see"
        )
    print(
        f"{args.folder}: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation tokens in "
        f"{len(manifest.shards)} shards, tokenizer {manifest.tokenizer.name}"
    )


if __name__ == "__main__":
    run(main)
