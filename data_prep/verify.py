"""Check a data folder against its manifest: every hash, count and id.

python -m data_prep.verify data/fineweb-edu-10B
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.common.command_line import ArgumentParser, UserError, raise_all, run
from data_prep.common.files import file_hash
from data_prep.common.hub import local_folder
from data_prep.sharding.manifest import Manifest, Shard
from data_prep.sharding.shards import open_shard
from data_prep.tokenization.tokenizer import hf_tokenizer, tokenizer_problem

_CHUNK_TOKENS = 1 << 24
_MAX_THREADS = 32  # with two open files each


def verify(folder: Path) -> Iterator[str]:
    """Lists differences between the files in `folder` and its manifest (`UserError` if it is unfinished or has no
    manifest)."""
    manifest = Manifest.load(folder)
    if manifest.unfinished is not None:
        raise UserError(f"{folder}: its preparation has not finished; the same prepare command goes on with it")
    problems = manifest.problems(folder)
    if not problems and (wrong := tokenizer_problem(hf_tokenizer(folder / "tokenizer"), manifest.tokenizer)):
        problems = [f"{folder / 'tokenizer'}: {wrong}"]
    yield from problems
    shards = [s for s in manifest.shards if not any(p.startswith(f"{folder / s.file}:") for p in problems)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
        for found in pool.map(lambda shard: list(_shard_problems(folder, manifest, shard)), shards):
            yield from found
    listed = {shard.file for shard in manifest.shards}
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".npy", ".bin") and p.name not in listed):
        yield f"{path}: not in the manifest"


def _shard_problems(folder: Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    path = folder / shard.file
    tokens, eos, vocab_size = open_shard(path), manifest.tokenizer.eos_token_id, manifest.tokenizer.vocab_size
    documents = largest = 0
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        part = tokens[start : start + _CHUNK_TOKENS]
        documents += int(np.count_nonzero(part == eos))
        largest = max(largest, int(part.max()))
    if file_hash(path) != shard.sha256:
        yield f"{path}: its sha256 is not the one in the manifest"
    if largest >= vocab_size:
        yield f"{path}: token id {largest}, the vocabulary ends at {vocab_size - 1}"
    if documents != shard.documents:
        yield f"{path}: {documents} documents begin in it, the manifest says {shard.documents}"


def main() -> None:
    parser = ArgumentParser("python -m data_prep.verify", __doc__)
    parser.add_argument("folder", type=local_folder, help="data folder, or hf://datasets/USER/NAME")
    folder = parser.parse_args().folder
    problems = list(verify(folder))
    manifest = Manifest.load(folder)
    raise_all(problems, "problems", f"{folder} is damaged; {manifest.remedy}: ")
    documents = sum(shard.documents for shard in manifest.shards)
    tokens = manifest.tokens("train") + manifest.tokens("val")
    print(f"{folder} is whole: {len(manifest.shards)} shards, {tokens:,} tokens, {documents:,} documents")


if __name__ == "__main__":
    run(main)
