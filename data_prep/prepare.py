"""Turn documents into a data folder: token shards, `manifest.json` and `tokenizer/`.

python -m data_prep.prepare data/shakespeare --source shakespeare.txt
python -m data_prep.prepare data/fineweb-edu --source HuggingFaceFW/fineweb-edu --name sample-10BT
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.cli import ArgumentParser, UserError, run
from data_prep.manifest import FILE_NAME, Manifest
from data_prep.shards import smallest_dtype, write_shards
from data_prep.sources import BUILTIN, Source
from data_prep.tokenizer import Tokenizer, gpt2_tokenizer, train_tokenizer

SHARD_TOKENS = 100_000_000
_BYTES_PER_TOKEN, _SHARDS_OF_A_SMALL_CORPUS = 4, 20


@dataclass(frozen=True)
class Recipe:
    """All that decides what a data folder holds.

    Attributes:
        source: where the documents come from.
        tokenizer: `gpt2`, or `bpe` for one trained on the corpus.
        vocab_size: of a trained tokenizer.
        shard_tokens: tokens in a shard; None for 100M, or a twentieth of a smaller local corpus.
        dtype: `uint16` or `uint32`; None for the smaller one that holds the vocabulary.
    """

    source: Source
    tokenizer: str = "gpt2"
    vocab_size: int = 4096
    shard_tokens: int | None = None
    dtype: str | None = None


def prepare(recipe: Recipe, folder: Path) -> Manifest:
    """Make `folder` as `recipe` says; it appears whole or not at all.

    A folder that is there already is returned if it was made from the same source with the same tokenizer, and refused
    otherwise.

    Raises:
        UserError: for whatever the user can mend.
    """
    if folder.exists():
        return _matching(recipe, folder)
    shard_tokens = _shard_tokens(recipe.source) if recipe.shard_tokens is None else recipe.shard_tokens
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens}: a shard holds at least one token")
    tokenizer = _tokenizer(recipe)
    dtype = recipe.dtype or smallest_dtype(tokenizer.vocab_size)
    if tokenizer.vocab_size - 1 > np.iinfo(dtype).max:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, {dtype} holds {np.iinfo(dtype).max + 1}; use dtype uint32"
        )

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        documents = _counted(tokenizer.encode(recipe.source.documents()))
        shards, dropped = write_shards(documents, partial, folder.name, shard_tokens, dtype)
        if len(shards) < 2:
            raise UserError(_too_small(recipe.source, sum(s.tokens for s in shards), shard_tokens))
        manifest = Manifest(
            source=recipe.source.describe(),
            tokenizer={
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "eos_token_id": tokenizer.eos_token_id,
                "sha256": tokenizer.save(partial / "tokenizer"),
            },
            dtype=dtype,
            shard_tokens=shard_tokens,
            shards=shards,
            dropped_tokens=dropped,
        )
        manifest.write(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _matching(recipe: Recipe, folder: Path) -> Manifest:
    if not (folder / FILE_NAME).exists():
        raise UserError(f"{folder} exists and is not a data folder (no {FILE_NAME}); choose another name")
    manifest = Manifest.read(folder)
    tokenizer = "gpt2" if recipe.tokenizer == "gpt2" else f"bpe-{recipe.vocab_size}"
    wanted = {**recipe.source.describe(), "tokenizer": tokenizer}
    found = {**manifest.source, "tokenizer": manifest.tokenizer["name"]}
    if recipe.shard_tokens is not None:
        wanted["shard_tokens"], found["shard_tokens"] = recipe.shard_tokens, manifest.shard_tokens
    if recipe.dtype is not None:
        wanted["dtype"], found["dtype"] = recipe.dtype, manifest.dtype
    if different := [key for key in wanted if wanted[key] != found.get(key)]:
        details = ", ".join(f"{key}={found.get(key)!r} (asked for: {wanted[key]!r})" for key in different)
        raise UserError(f"{folder} was made with {details}; choose another folder, or remove this one")
    return manifest


def _tokenizer(recipe: Recipe) -> Tokenizer:
    if recipe.tokenizer == "gpt2":
        return gpt2_tokenizer()
    if recipe.source.source != BUILTIN and not recipe.source.files():
        raise UserError("a tokenizer is trained on local text only, not on a stream; use --tokenizer gpt2")
    return train_tokenizer(recipe.source.documents(), recipe.vocab_size)


def _shard_tokens(source: Source) -> int:
    size = sum(path.stat().st_size for path in source.files())
    if not size:
        return SHARD_TOKENS
    return min(SHARD_TOKENS, max(1, size // (_BYTES_PER_TOKEN * _SHARDS_OF_A_SMALL_CORPUS)))


def _counted(documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    from tqdm import tqdm

    with tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, disable=None) as bar:
        for tokens in documents:
            yield tokens
            bar.update(len(tokens))


def _too_small(source: Source, tokens: int, shard_tokens: int) -> str:
    if not tokens:
        return f"source {source.source!r} yields no text"
    return (
        f"source {source.source!r} yields {tokens} tokens, which leaves none for training after a validation shard of "
        f"{shard_tokens}; choose a smaller --shard_tokens or more text"
    )


def main() -> None:
    parser = ArgumentParser(prog="python -m data_prep.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="data folder to make")
    parser.add_option(
        "source",
        required=True,
        help="'builtin' (the Python standard library's sources), a file, folder or glob of .txt, .jsonl(.gz|.zst) or "
        ".parquet, or a data set of the Hub, which is streamed",
    )
    parser.add_option("name", help="configuration of the Hub data set, as in 'sample-10BT'")
    parser.add_option("split", default="train", help="split of the Hub data set")
    parser.add_option("revision", help="branch, tag or commit of the Hub data set")
    parser.add_option("text_column", default="text", help="field of a record that holds the text")
    parser.add_option("tokenizer", choices=["gpt2", "bpe"], default="gpt2", help="GPT-2's, or one trained on the text")
    parser.add_option("vocab_size", type=int, default=4096, help="tokens of a trained tokenizer, end of text included")
    parser.add_option(
        "shard_tokens",
        type=int,
        help="tokens in a shard, the first of which is validation; 100M by default, or a twentieth of a smaller local "
        "corpus",
    )
    parser.add_option(
        "dtype", choices=["uint16", "uint32"], help="by default the smaller one that holds the vocabulary"
    )
    args = parser.parse_args()
    source = Source(args.source, args.name, args.split, args.revision, args.text_column)
    recipe = Recipe(source, args.tokenizer, args.vocab_size, args.shard_tokens, args.dtype)
    manifest = prepare(recipe, args.folder)
    print(
        f"{args.folder}: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation tokens in "
        f"{len(manifest.shards)} shards, tokenizer {manifest.tokenizer['name']}"
    )


if __name__ == "__main__":
    run(main)
