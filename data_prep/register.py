"""Use published shards as they are: write a manifest and a tokenizer next to them.

python -m data_prep.register data/fineweb10B --tokenizer gpt2

For folders of `.bin` (llm.c, modded-nanogpt) or `.npy` (build-nanogpt) shards with `val` or `train` in their names.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import ArgumentParser, UserError, listed, run
from data_prep.common.files import file_hash
from data_prep.sharding.manifest import FILE_NAME, REGISTERED, Manifest, Shard, split_of_name
from data_prep.sharding.shards import Split, open_shard
from data_prep.sources.source import SourceRecord
from data_prep.tokenization.tokenizer import describe_tokenizer, load_tokenizer, tokenizer_hash


def register(folder: Path, tokenizer_name: str = "gpt2") -> Manifest:
    """Writes a manifest for the shards in `folder`, and a tokenizer if there is none. Changes no other file.

    Args:
        tokenizer_name: tokenizer of the shards, if there is none beside them: `gpt2`, or what `AutoTokenizer` loads.

    Raises:
        UserError: for a folder that has a manifest, lacks a split, mixes formats or types, or has ids that the
            tokenizer does not have.
    """
    if (folder / FILE_NAME).exists():
        raise UserError(f"{folder} has a {FILE_NAME} already")
    own = folder / "tokenizer"
    tokenizer = load_tokenizer(own if own.exists() else tokenizer_name)
    shards: list[Shard] = []
    kinds: set[Any] = set()  # format and dtype
    for path, split in _shard_paths(folder):
        tokens = open_shard(path)
        if not len(tokens):
            raise UserError(f"{path}: there are no tokens in it; remove it")
        if (largest := int(tokens.max())) >= tokenizer.vocab_size:
            raise UserError(
                f"{path}: its largest id is {largest}, and those of tokenizer {tokenizer.name!r} end at "
                f"{tokenizer.vocab_size - 1}; name the one that wrote it with --tokenizer"
            )
        documents = int(np.count_nonzero(tokens == tokenizer.eos_token_id))
        shards.append(Shard(path.name, split, len(tokens), documents, file_hash(path)))
        kinds.add((path.suffix.lstrip("."), tokens.dtype.name))
    if not any(shard.documents for shard in shards):
        raise UserError(
            f"{folder}: none of the shards has id {tokenizer.eos_token_id} in it, with which tokenizer "
            f"{tokenizer.name!r} begins documents; name the one that wrote them with --tokenizer"
        )
    if len(kinds) != 1:
        names = ", ".join(sorted(" ".join(kind) for kind in kinds))
        raise UserError(f"{folder}: shards of several kinds ({names}); use one folder each")
    form, dtype = kinds.pop()
    manifest = Manifest(
        source=SourceRecord(REGISTERED),
        tokenizer=describe_tokenizer(tokenizer, tokenizer_hash(own) if own.exists() else tokenizer.save(own)),
        format=form,
        dtype=dtype,
        shard_tokens=max(shard.tokens for shard in shards),
        val_shards=sum(shard.split == "val" for shard in shards),
        shards=shards,
    )
    if contradictions := list(manifest.contradictions()):
        raise UserError(f"{folder}: {listed(contradictions)}")
    manifest.write(folder)
    return manifest


def _shard_paths(folder: Path) -> list[tuple[Path, Split]]:
    """Shards and their splits, validation first, sorted by name."""
    paths: dict[Split, list[Path]] = {"val": [], "train": []}
    for path in sorted(path for path in folder.glob("*") if path.suffix in (".npy", ".bin")):
        if (split := split_of_name(path.name)) is None:
            raise UserError(f"{path}: the name of a shard says either 'val' or 'train', as in name_train_000001")
        paths[split].append(path)
    if not all(paths.values()):
        raise UserError(f"{folder}: no .npy or .bin files with 'val' and with 'train' in their names")
    return [(path, split) for split, found in paths.items() for path in found]


def main() -> None:
    parser = ArgumentParser("python -m data_prep.register", __doc__)
    parser.add_argument("folder", type=Path, help="folder of shards")
    parser.add_option("tokenizer", default="gpt2", help="tokenizer of the shards, if none is stored with them")
    args = parser.parse_args()
    manifest = register(args.folder, args.tokenizer)
    print(f"{args.folder}: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation tokens")


if __name__ == "__main__":
    run(main)
