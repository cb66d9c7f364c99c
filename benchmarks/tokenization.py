"""Speed of data preparation, beside tiktoken alone, and build-nanogpt's and nanoGPT's scripts, rewritten.

python -m benchmarks.tokenization

The text is the Python sources and documentation on this machine, in one parquet file. Each measurement is a new
process; implementations run interleaved. Memory is that of the process tree (proportional set size on Linux).
"""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.tokenization.gigatoken import Engine

_SHARD_TOKENS = 100_000_000
_CORES = os.cpu_count() or 1
_ROOT = Path(__file__).parents[1]  # benchmarks are not installed: `python -m` finds them from here


def make_corpus(path: Path, megabytes: int) -> int:
    """Writes Python sources and documentation to one parquet file, repeated if this machine has less than `megabytes`
    of them, and returns the bytes of text."""
    import pyarrow
    from pyarrow import parquet

    texts: dict[str, None] = {}
    size = 0
    for root in dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")):
        for file in sorted(Path(root).rglob("*")):
            if size < megabytes * 1_000_000 and file.suffix in (".py", ".pyi", ".rst", ".txt", ".md", ".h"):
                text = file.read_text(encoding="utf-8", errors="ignore")
                if text.strip() and text not in texts:
                    texts[text] = None
                    size += len(text.encode())
    documents, rng = list(texts), np.random.default_rng(0)
    copies = -(-megabytes * 1_000_000 // size)
    order = [i for _ in range(copies) for i in rng.permutation(len(documents))]
    table = pyarrow.table({"text": [documents[i] for i in order]})
    parquet.write_table(table, path, row_group_size=1000, compression="snappy")
    return size * copies


def ours(corpus: Path, scratch: Path, engine: Engine, workers: int = _CORES) -> float:
    """Measures this project's preparation, end to end."""
    import fsspec  # noqa: F401  imports are not measured
    import pyarrow.parquet  # noqa: F401

    from data_prep.prepare import Recipe, prepare
    from data_prep.sources.source import Source

    started = time.perf_counter()
    recipe = Recipe(Source(str(corpus)), shard_tokens=min(_SHARD_TOKENS, corpus.stat().st_size // 4))
    prepare(recipe, scratch / "ours", workers, engine)
    return time.perf_counter() - started


def pool_based(corpus: Path, scratch: Path, workers: int = max(1, _CORES // 2)) -> float:
    """Measures build-nanogpt's method: the data set on disk, then a process pool that returns an array per document."""
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    documents = datasets.load_dataset("parquet", data_files=str(corpus), split="train", cache_dir=str(scratch / "hf"))
    shard_tokens = min(_SHARD_TOKENS, corpus.stat().st_size // 4)
    buffer, filled, shards = np.empty((shard_tokens,), dtype=np.uint16), 0, 0
    with multiprocessing.Pool(workers) as pool:
        for tokens in pool.imap(_tokens_of_document, documents, chunksize=16):
            while filled + len(tokens) >= shard_tokens:
                room = shard_tokens - filled
                buffer[filled:] = tokens[:room]
                np.save(scratch / f"pool_{shards:06d}.npy", buffer)
                tokens, filled, shards = tokens[room:], 0, shards + 1
            buffer[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        if filled:
            np.save(scratch / f"pool_{shards:06d}.npy", buffer[:filled])
    return time.perf_counter() - started


def _tokens_of_document(document: dict[str, str]) -> np.ndarray:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")  # cached by tiktoken after the first call
    tokens = np.array([encoding._special_tokens["<|endoftext|>"], *encoding.encode_ordinary(document["text"])])
    assert (tokens >= 0).all() and (tokens < 2**16).all(), "token ids do not fit into uint16"
    return tokens.astype(np.uint16)


def datasets_map(corpus: Path, scratch: Path) -> float:
    """Measures nanoGPT's method: the data set on disk, `map` with a process a core, then one array on disk."""
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    documents = datasets.load_dataset("parquet", data_files=str(corpus), split="train", cache_dir=str(scratch / "hf"))
    mapped = documents.map(_ids_of_document, remove_columns=["text"], num_proc=_CORES)
    lengths = np.sum(mapped["len"], dtype=np.uint64)
    array = np.memmap(scratch / "map.bin", dtype=np.uint16, mode="w+", shape=(int(lengths),))
    filled = 0
    for number in range(shards := min(1024, len(mapped))):
        part = mapped.shard(shards, number, contiguous=True).with_format("numpy")
        ids = np.concatenate(part["ids"][:])
        array[filled : filled + len(ids)] = ids
        filled += len(ids)
    array.flush()
    return time.perf_counter() - started


def _ids_of_document(document: dict[str, str]) -> dict[str, Any]:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    ids = [*encoding.encode_ordinary(document["text"]), encoding.eot_token]
    return {"ids": ids, "len": len(ids)}


def tiktoken_batch(corpus: Path, scratch: Path) -> float:
    """Measures tiktoken's own batch function on all cores; texts are in memory, tokens are discarded."""
    import tiktoken

    encoding, texts = tiktoken.get_encoding("gpt2"), _texts(corpus)
    started = time.perf_counter()
    for first in range(0, len(texts), 256):
        encoding.encode_ordinary_batch(texts[first : first + 256], num_threads=_CORES)
    return time.perf_counter() - started


def tiktoken_threads(corpus: Path, scratch: Path) -> float:
    """Measures tiktoken with a thread per core, ids as arrays instead of lists."""
    from data_prep.tokenization.tokenizer import gpt2_tokenizer

    tokenizer, texts = gpt2_tokenizer(), _texts(corpus)

    def encode(first: int) -> None:
        encode_one = tokenizer.encoding.encode_to_numpy
        for text in texts[first : first + 64]:
            encode_one(text, disallowed_special=())

    started = time.perf_counter()
    with ThreadPoolExecutor(_CORES) as pool:
        list(pool.map(encode, range(0, len(texts), 64)))
    return time.perf_counter() - started


def tiktoken_processes(corpus: Path, scratch: Path) -> float:
    """Measures tiktoken with a process per core, which inherits the texts and returns nothing."""
    import tiktoken

    encoding, texts = tiktoken.get_encoding("gpt2"), _texts(corpus)

    def encode(first: int) -> None:
        for i in range(first, len(texts), _CORES):
            encoding.encode_to_numpy(texts[i], disallowed_special=())

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=encode, args=(first,)) for first in range(_CORES)]
    started = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return time.perf_counter() - started


def _texts(corpus: Path) -> list[str]:
    from pyarrow import parquet

    return parquet.read_table(corpus, columns=["text"]).column("text").to_pylist()


IMPLEMENTATIONS: dict[str, Callable[[Path, Path], float]] = {
    "this preparation, gigatoken": lambda corpus, scratch: ours(corpus, scratch, "gigatoken"),
    "this preparation, gigatoken, one worker": lambda corpus, scratch: ours(corpus, scratch, "gigatoken", 1),
    "this preparation, tiktoken": lambda corpus, scratch: ours(corpus, scratch, "tiktoken"),
    "this preparation, tiktoken, one worker": lambda corpus, scratch: ours(corpus, scratch, "tiktoken", 1),
    "datasets.map, all cores": datasets_map,
    "pool-based, its default of half the cores": pool_based,
    "pool-based, all cores": lambda corpus, scratch: pool_based(corpus, scratch, _CORES),
    "tiktoken alone, encode_ordinary_batch": tiktoken_batch,
    "tiktoken alone, threads": tiktoken_threads,
    "tiktoken alone, processes": tiktoken_processes,
}


def measure(name: str, corpus: Path) -> tuple[float, float]:
    """Runs one implementation in a new process, and returns its seconds and the peak memory of its tree in bytes."""
    import psutil

    with tempfile.TemporaryDirectory(dir=corpus.parent) as scratch:
        words = [sys.executable, "-m", "benchmarks.tokenization", "--implementation", name, str(corpus), scratch]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_memory(psutil.Process(process.pid)))
            time.sleep(0.5)
        if process.returncode:
            raise UserError(f"{name}: ended with code {process.returncode}")
        return json.loads(process.stdout.read()), peak


def _tree_memory(root: "psutil.Process") -> int:  # noqa: F821
    """Returns the proportional set size on Linux, where processes share pages, and the resident size elsewhere."""
    import psutil

    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    except psutil.Error:  # a process has ended in the meantime
        return 0
    return total


def table(rows: dict[str, list[tuple[float, float]]], text_bytes: int, tokens: int) -> str:
    """Returns a Markdown table. Ratios are medians of the ratios within a round."""
    seconds = {name: [s for s, _ in runs] for name, runs in rows.items()}
    fastest = min((name for name in rows if name.startswith("tiktoken")), key=lambda n: statistics.median(seconds[n]))
    default = next(name for name in rows if "default" in name)

    def ratio(reference: str, name: str) -> float:
        return statistics.median(r / s for r, s in zip(seconds[reference], seconds[name], strict=True))

    lines = ["| | M tokens/s (spread) | MB/s | times tiktoken alone | times the pool's default | peak memory |"]
    lines.append("|---|---|---|---|---|---|")
    for name, runs in rows.items():
        rates = sorted(tokens / s / 1e6 for s in seconds[name])
        lines.append(
            f"| {name} | {statistics.median(rates):.2f} ({rates[0]:.2f} to {rates[-1]:.2f}) | "
            f"{text_bytes / statistics.median(seconds[name]) / 1e6:.1f} | {ratio(fastest, name):.2f} | "
            f"{ratio(default, name):.2f} | {max(m for _, m in runs) / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.tokenization", __doc__)
    parser.add_option("megabytes", type=int, default=300, help="size of the text")
    parser.add_option("repeats", type=int, default=5, help="rounds of measurements")
    parser.add_option("implementation", nargs=3, metavar=("NAME", "CORPUS", "SCRATCH"), help="run one, once")
    args = parser.parse_args()
    if args.implementation:
        name, corpus, scratch = args.implementation
        print(json.dumps(IMPLEMENTATIONS[name](Path(corpus), Path(scratch))))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.parquet"
        text_bytes = make_corpus(corpus, args.megabytes)
        texts = _texts(corpus)
        print(f"{text_bytes / 1e6:.0f} MB of text in {len(texts):,} documents; {_CORES} cores, {platform.processor()}")
        from data_prep.tokenization.tokenizer import gpt2_tokenizer

        tokenizer = gpt2_tokenizer()
        tokens = sum(len(tokenizer.encode([text])) for text in texts)
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPLEMENTATIONS}
        for number in range(args.repeats):
            for name in IMPLEMENTATIONS:
                rows[name].append(measure(name, corpus))
                print(f"round {number + 1}: {name}: {rows[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
        print(table(rows, text_bytes, tokens))


if __name__ == "__main__":
    run(main)
