"""What preparation writes, however often it is killed and however many threads take part."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from socket import gethostname
from subprocess import PIPE

import numpy as np
import pyarrow
import pytest
from conftest import ROOT, needs_compiler, run_command
from pyarrow import parquet
from standin_hub import serve_dataset

from data_prep.common.command_line import UserError
from data_prep.common.locks import locked
from data_prep.prepare import Recipe, main, prepare
from data_prep.sharding.manifest import Manifest
from data_prep.sources.opening import open_source
from data_prep.sources.source import Position, Source
from data_prep.tokenization.tokenizer import ByteLevelTokenizer, load_tokenizer, train_tokenizer
from data_prep.verify import verify
from tests.data_prep.tokenization.test_gigatoken import hostile


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of a few words to a few thousand, some empty."""
    rng = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "été", "日本", "🙂", "\n", "def", "self", "1234"]
    return [" ".join(rng.choices(words, k=int(rng.paretovariate(0.6)) % 3000 - 1)) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of all kinds, about a megabyte each, so that each is read in several blocks."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(6000, 1))
    (folder / "a.jsonl").write_text(lines)
    parquet.write_table(pyarrow.table({"text": texts(6000, 2)}), folder / "b.parquet", row_group_size=700)
    (folder / "c.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
    (folder / "d.txt").write_text("\n\n".join(texts(6000, 3)))
    return folder


def recipe(corpus, **options) -> Recipe:
    return Recipe(Source(str(corpus)), **{"tokenizer": "bpe", "vocab_size": 301, "shard_tokens": 100_003, **options})


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "data"
    prepare(recipe(corpus), folder, workers=1, engine="tiktoken")
    return folder


def contents(folder) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_shards_hold_all_documents_in_order(corpus, undisturbed):
    """Against one array of all that the tokenizer gives, made without any of the machinery."""
    manifest = Manifest.read(undisturbed)
    tokenizer = load_tokenizer(undisturbed / "tokenizer")
    whole = np.concatenate([tokenizer.encode([text]) for text in open_source(Source(str(corpus))).documents()])
    shards = [np.load(undisturbed / shard.file) for shard in manifest.shards]
    assert [shard.file for shard in manifest.shards[:2]] == ["data_val_000000.npy", "data_train_000001.npy"]
    assert [len(shard) for shard in shards[:-1]] == [100_003] * (len(shards) - 1) and 0 < len(shards[-1]) <= 100_003
    assert [shard.documents for shard in manifest.shards] == [int((array == 300).sum()) for array in shards]
    # Nothing lost and nothing moved, but for the rest of the document that validation ends in.
    dropped = manifest.dropped_tokens
    assert np.array_equal(np.concatenate(shards), np.concatenate([whole[:100_003], whole[100_003 + dropped :]]))
    assert 0 < dropped < 10_000 and shards[1][0] == 300 and 300 not in whole[100_003 : 100_003 + dropped]
    assert list(verify(undisturbed)) == []


@pytest.mark.parametrize(("workers", "engine"), [(2, "tiktoken"), (1, "gigatoken"), (3, "gigatoken")])
def test_bytes_do_not_depend_on_workers_and_engine(corpus, undisturbed, tmp_path, workers, engine):
    prepare(recipe(corpus), tmp_path / "data", workers, engine)
    assert contents(tmp_path / "data") == contents(undisturbed)


def test_several_validation_shards_and_bin(corpus, undisturbed, tmp_path):
    manifest = prepare(recipe(corpus, val_shards=3, format="bin"), tmp_path / "data")
    assert [shard.split for shard in manifest.shards[:4]] == ["val", "val", "val", "train"]
    assert manifest.shards[0].file == "data_val_000000.bin" and manifest.tokens("val") == 3 * 100_003
    raw = np.fromfile(tmp_path / "data" / "data_val_000000.bin", dtype=np.uint16)[512:]
    assert np.array_equal(raw, np.load(undisturbed / "data_val_000000.npy"))
    assert list(verify(tmp_path / "data")) == []


class Stop(BaseException):
    """Stands in for a kill."""


@contextlib.contextmanager
def stopped(shards: int, written: bool):
    """Stops after or before the manifest of `shards` shards is written, unless it is the final one."""
    usual = Manifest.write

    def write(self, folder):
        if written or len(self.shards) < shards:
            usual(self, folder)
        if len(self.shards) >= shards and (self.unfinished is not None or not written):
            raise Stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(Manifest, "write", write)
        yield


KILLED = """
import os, pathlib, sys
from data_prep import prepare
from data_prep.sharding import manifest, shards
count, moment = int(sys.argv.pop()), sys.argv.pop()
kind, name = {"fsync": (os, "fsync"), "add": (shards.ShardFile, "add"), "hash": (shards, "file_hash"),
              "manifest": (manifest.Manifest, "write"), "replace": (pathlib.Path, "replace")}[moment]
usual = getattr(kind, name)
def counted(*args):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), 9)
    return usual(*args)
setattr(kind, name, counted)
prepare.main()
"""


def command_line(corpus, folder) -> list[str]:
    flags = ["--tokenizer", "bpe", "--vocab_size", "301", "--shard_tokens", "100003"]
    return [str(folder), "--source", str(corpus), *flags]


@pytest.mark.processes
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_many_moments_it_writes_the_same(corpus, undisturbed, tmp_path, seed):
    """Each process kills itself, as `kill -9` does, in a random call: where it writes, hashes, renames or counts."""
    rng = random.Random(seed)
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    folder = tmp_path / "data"
    shards_seen = [0]
    early = rng.sample([("fsync", 0), ("manifest", 0), ("fsync", 1), ("manifest", 1), ("add", 0)], 3)
    late = [(moment, rng.randrange(4, 16)) for moment in rng.sample(["fsync", "add", "hash", "manifest", "replace"], 5)]
    for moment, calls in early + late:
        words = [program, *command_line(corpus, folder), moment, str(calls)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        if (folder / "manifest.json").exists():
            shards_seen.append(len(Manifest.load(folder).shards))
            assert shards_seen == sorted(shards_seen)  # what is finished stays
            assert all((folder / shard.file).exists() for shard in Manifest.load(folder).shards)
    assert max(shards_seen) > 2
    run_command(sys.executable, "-m", "data_prep.prepare", *command_line(corpus, folder), cwd=ROOT)
    assert contents(folder) == contents(undisturbed)


@pytest.fixture(scope="module")
def hostile_corpus(tmp_path_factory):
    """200,000 strings of characters of all planes among ordinary documents."""
    documents = [*hostile(random.Random(5), 200_000), *texts(6000, 4)]
    random.Random(6).shuffle(documents)
    folder = tmp_path_factory.mktemp("hostile")
    for number in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in documents[number::3])
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("which", ["corpus", "hostile_corpus"])
def test_killed_from_outside_at_random_times(which, request, tmp_path):
    """`kill -9` by another process after random times, over and over until it is done, for several folders; each
    process has another engine and number of workers. The result is that of tiktoken on one thread."""
    corpus, rng = request.getfixturevalue(which), random.Random(0)
    expected = tmp_path / "expected" / "data"
    prepare(recipe(corpus), expected, workers=1, engine="tiktoken")
    kills = 0
    for number in range(6):
        folder = tmp_path / str(number) / "data"
        finished, tries = False, 0
        while not finished:
            tries += 1
            patience = rng.uniform(0.5, 3) * (1 + tries / 2)  # a machine may be too slow to begin in three seconds
            how = ["--engine", rng.choice(["tiktoken", "gigatoken"]), "--workers", str(rng.randrange(1, 4))]
            words = [sys.executable, "-m", "data_prep.prepare", *command_line(corpus, folder), *how]
            with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
                try:
                    finished = process.wait(timeout=patience) == 0
                    assert finished, process.stderr.read()
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
        assert contents(folder) == contents(expected)
    assert kills > 6


def test_it_goes_on_from_every_shard(corpus, undisturbed, tmp_path):
    """From the manifests of a folder in all its stages, in particular from where validation ends."""
    for stage in range(1, 5):
        folder = tmp_path / str(stage) / "data"
        with stopped(stage, written=True):
            prepare(recipe(corpus), folder)
        with pytest.raises(UserError, match=f"has not finished .{stage} shards so far."):
            Manifest.read(folder)
        prepare(recipe(corpus), folder)
        assert contents(folder) == contents(undisturbed)


def test_preparing_again_changes_nothing(corpus, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert prepare(recipe(corpus), undisturbed) == Manifest.read(undisturbed)
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 700}, "tokenizer='bpe-301' .now: 'bpe-700'"),
        ({"shard_tokens": 5}, "shard_tokens=100003 .now: 5"),
        ({"val_shards": 2}, "val_shards=1"),
        ({"format": "bin"}, "format='npy'"),
        ({"source": Source("builtin")}, "source='.*corpus.*now: 'builtin'"),
    ],
)
def test_another_recipe_for_the_same_folder_is_refused(corpus, undisturbed, change, message):
    before = contents(undisturbed)
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(recipe(corpus), **change), undisturbed)
    assert contents(undisturbed) == before


def test_files_that_have_changed_are_noticed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "one two three"}\n' * 2000)
    options = recipe(tmp_path / "in", shard_tokens=500, vocab_size=260)
    prepare(options, tmp_path / "out")
    (tmp_path / "in" / "b.txt").write_text("more")
    with pytest.raises(UserError, match=r"files=1 \(now: 2\), bytes="):
        prepare(options, tmp_path / "out")
    (tmp_path / "in" / "b.txt").unlink()
    (tmp_path / "in" / "a.jsonl").rename(tmp_path / "in" / "c.jsonl")
    with pytest.raises(UserError, match="was made with names_and_sizes="):
        prepare(options, tmp_path / "out")


def test_two_processes_do_not_write_one_folder(corpus, tmp_path):
    """The second is refused while the first reads from a pipe that nothing has been written to."""
    folder = tmp_path / "data"
    with locked(folder), pytest.raises(UserError, match="is in use by another process"):
        prepare(recipe(corpus), folder)
    holder = (
        f"from pathlib import Path; from data_prep.common.locks import locked\nwith locked(Path({str(folder)!r})): "
    )
    words = [sys.executable, "-c", holder + "print('held', flush=True); input()"]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another process"):
            prepare(recipe(corpus), folder)
        process.kill()
    prepare(recipe(corpus, shard_tokens=1_000_000), folder)  # what a killed one leaves does not hold it
    assert not (folder / ".gpt-accelerate.lock").exists()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="replaces a function of the C library by LD_PRELOAD")
def test_where_flock_is_refused_the_file_is_the_lock(tmp_path):
    """The C library's own function fails as on NFS, Lustre and in some containers."""
    (tmp_path / "flock.c").write_text("""
#include <errno.h>
#include <stdlib.h>
int flock(int descriptor, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
""")
    compiler = shutil.which("g++") or "clang++"
    run_command(
        compiler, "-x", "c", "-shared", "-fPIC", "-o", tmp_path / "flock.so", tmp_path / "flock.c", cwd=tmp_path
    )
    program = f"""
import os
from pathlib import Path
from data_prep.common.command_line import run
from data_prep.common.locks import locked
def hold():
    with locked(Path({str(tmp_path / "data")!r})):
        print(os.getpid(), flush=True)
        input()
run(hold)
"""

    def start(number: int) -> subprocess.Popen:
        environment = os.environ | {"LD_PRELOAD": str(tmp_path / "flock.so"), "FLOCK_ERRNO": str(number)}
        return subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT, env=environment, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True,
        )  # fmt: skip

    lock = tmp_path / "data" / ".gpt-accelerate.lock"
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        with start(number) as holder:
            assert int(holder.stdout.readline()) == holder.pid
            refused = start(number).communicate()
            holder.kill()  # not reaped before the next one looks
            with start(number) as second:
                assert int(second.stdout.readline()) == second.pid
                assert second.communicate("\n") == ("", "") and not lock.exists()
        assert refused[1].startswith(f"error: {tmp_path}/data is in use by process {holder.pid} on {gethostname()} (")
        assert refused[1].endswith(f", or stop it, or remove {lock} if it has ended\n")
    lock.parent.mkdir(exist_ok=True)
    for owner in (f"process {holder.pid} on elsewhere (pid:[1])", ""):
        lock.write_text(owner)
        assert f"is in use by {owner or 'an unknown process'}; wait" in start(number).communicate()[1]


def test_what_fails_leaves_a_linked_folder_and_says_why(tmp_path):
    """A data folder that is a link to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        prepare(Recipe(Source(str(tmp_path / "a.txt")), tokenizer="bpe", vocab_size=257), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("options", [{}, {"val_shards": 3}])
@pytest.mark.parametrize("texts", [["a book of many words\n" * 30], ["a note", "a book of many words\n" * 30]])
def test_a_document_that_is_all_there_is_gets_split(tmp_path, texts, options):
    """Training has what follows validation, as a document of its own; the same after a kill at any shard."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 260)
    tokenizer.save(tmp_path / "tokenizer")
    whole = tokenizer.encode(texts)
    options = Recipe(Source(str(tmp_path / "a.jsonl")), str(tmp_path / "tokenizer"), **{"shard_tokens": 50} | options)
    manifest = prepare(options, folder := tmp_path / "whole" / "data")
    shards = [np.load(folder / shard.file) for shard in manifest.shards]
    cut = options.val_shards * options.shard_tokens
    assert np.concatenate(shards).tolist() == [*whole[:cut], 259, *whole[cut:]]
    assert manifest.split_document and manifest.dropped_tokens == 0 and list(verify(folder)) == []
    assert sum(shard.documents for shard in manifest.shards) == len(texts) + 1
    for count in range(1, min(6, len(shards))):
        again = tmp_path / str(count) / "data"
        with stopped(count, written=True):
            prepare(options, again)
        prepare(options, again)
        assert contents(again) == contents(folder)


@pytest.mark.parametrize("written", [True, False])
def test_the_builtin_corpus_goes_on_at_its_end(data_folder, tmp_path, monkeypatch, written):
    """Stopped at each of the last manifests: nothing is written twice."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(Path(json.__file__).parent))
    options = Recipe(Source("builtin"), tokenizer=str(data_folder / "tokenizer"), shard_tokens=5_000)
    whole = prepare(options, tmp_path / "whole")
    for count in range(len(whole.shards) - 2, len(whole.shards) + 1):
        folder = tmp_path / str(count) / "whole"
        with stopped(count, written):
            prepare(options, folder)
        prepare(options, folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_killed_beginning_leaves_nothing_to_another_recipe(corpus, tmp_path):
    """Killed between the first shard and its manifest; then the folder is made in another format."""
    with stopped(1, written=False):
        prepare(recipe(corpus), tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").glob("*.npy")] == ["data_val_000000.npy"]
    prepare(recipe(corpus, format="bin"), tmp_path / "data")
    assert list(verify(tmp_path / "data")) == [] and not list((tmp_path / "data").glob("*.npy"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(data_folder, tmp_path):
    """120 MB of repeated long rows, of which parquet keeps three; a document of 4 million letters; a line of 8 MB."""
    rows = [f"x{' ' * 200_000}{i}" for i in range(3)]
    parquet.write_table(pyarrow.table({"text": rows * 200}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10**7
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("é" * 4_000_000, "end")))
    (tmp_path / "c.txt").write_text("na" * 4_000_000)
    program = "from data_prep import prepare; prepare.main(); print(open('/proc/self/status').read())"
    for name in ("a.parquet", "b.jsonl", "c.txt"):
        flags = ["--source", tmp_path / name, "--tokenizer", data_folder / "tokenizer", "--shard_tokens", "1000000"]
        done = run_command(sys.executable, "-c", program, tmp_path / f"{name}.data", *flags, cwd=ROOT)
        peak = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("VmHWM"))
        assert peak < 900 * 1024, f"{name}: {peak} KiB"


def test_a_full_disk_is_said_and_loses_nothing(corpus, undisturbed, tmp_path):
    """A write that fails as it does on a full disk stands in for one: the fourth shard does not fit."""
    program = (
        "import errno, os, sys; from data_prep import prepare; from data_prep.sharding import shards\n"
        "usual, room = shards.ShardFile.add, [700_000]\n"
        "def add(self, tokens):\n"
        "    room[0] -= tokens.nbytes\n"
        "    if room[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    usual(self, tokens)\n"
        "shards.ShardFile.add = add\n"
        "from data_prep.common.command_line import run; run(prepare.main)"
    )
    words = command_line(corpus, tmp_path / "data")
    done = run_command(sys.executable, "-c", program, *words, cwd=ROOT, exit_code=2)
    assert "the disk is full" in done.stderr and "the next shard takes 0 MB and all that is left about" in done.stderr
    assert "goes on after the 3 shards that are finished" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "data").glob("*.tmp")) and len(Manifest.load(tmp_path / "data").shards) == 3
    prepare(recipe(corpus), tmp_path / "data")
    assert contents(tmp_path / "data") == contents(undisturbed)


def test_a_bad_record_is_said_and_loses_nothing(corpus, undisturbed, tmp_path):
    """Mended, the run goes on: the bytes are those of a corpus that was never damaged."""
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    good = (copy / "d.txt").read_bytes()
    index = len(good) // 2
    (copy / "d.txt").write_bytes(good[:index] + b"\xff" + good[index + 1 :])
    options = recipe(copy, tokenizer=str(undisturbed / "tokenizer"))
    with pytest.raises(UserError, match=rf"d\.txt: not UTF-8 at byte {index} "):
        prepare(options, tmp_path / "data")
    assert len(Manifest.load(tmp_path / "data").shards) > 3
    (copy / "d.txt").write_bytes(good)
    assert prepare(options, tmp_path / "data").shards == Manifest.read(undisturbed).shards


def test_bad_files_are_skipped_and_listed_if_asked_for(corpus, undisturbed, tmp_path):
    """Also by a preparation that such a file has stopped; wherever it is stopped, the result is the same."""
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    (copy / "aa").mkdir()
    (copy / "aa" / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(copy / "aa" / "pipe.txt")
    (copy / "aa" / "cut.jsonl.zst").write_bytes((copy / "c.jsonl.zst").read_bytes()[:1000])
    (copy / "aa" / "other.jsonl").write_text('{"body": "x"}\n')
    kept = ["some words " * 30_000] * 4  # more than a block
    (copy / "z.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*kept, "lost"]) + "not json\n")
    damaged = recipe(copy, tokenizer=str(undisturbed / "tokenizer"))
    skips = dataclasses.replace(damaged, on_bad_file="skip")
    manifest = prepare(skips, tmp_path / "data")
    assert manifest.source.files == 9 and manifest.bad_files == {
        "aa/cut.jsonl.zst": "the file is cut off",
        "aa/dangling.txt": "[Errno 2] No such file or directory: 'aa/dangling.txt'",
        "aa/other.jsonl": "line 1: no field 'text' among ['body']; name one with --text_column, --tokens_column or "
        "--where",
        "aa/pipe.txt": "not a regular file",
        "z.jsonl": "line 6: not JSON (Expecting value: line 1 column 1 (char 0))",
    }
    tokenizer = load_tokenizer(undisturbed / "tokenizer")
    written = np.concatenate([np.load(tmp_path / "data" / shard.file) for shard in manifest.shards])
    good = np.concatenate([np.load(undisturbed / shard.file) for shard in Manifest.read(undisturbed).shards])
    assert np.array_equal(written, np.concatenate([good, tokenizer.encode(kept)]))
    with stopped(3, written=True):
        prepare(skips, tmp_path / "again" / "data")
    prepare(skips, tmp_path / "again" / "data")
    assert contents(tmp_path / "again" / "data") == contents(tmp_path / "data")
    shutil.rmtree(copy / "aa")
    with pytest.raises(UserError, match=r"z\.jsonl, line 6: not JSON"):
        prepare(damaged, tmp_path / "stopped" / "data")
    continued = prepare(skips, tmp_path / "stopped" / "data")
    assert continued.shards == manifest.shards and list(continued.bad_files) == ["z.jsonl"]


@pytest.mark.parametrize(("name", "reason"), [("a.jsonl", "line 1: not JSON"), ("a.csv", "record 1: no field 'text'")])
def test_a_source_of_bad_files_only(data_folder, tmp_path, name, reason):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / name).write_text("not json\n1\n")
    (texts / "a.zip").write_text("")
    recipe = Recipe(Source(str(texts)), tokenizer=str(data_folder / "tokenizer"), on_bad_file="skip")
    with pytest.raises(UserError, match=rf"yields no text; 0 files read, 2 not: 1 \.zip, 1 bad: {name} \({reason}"):
        prepare(recipe, tmp_path / "data")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b"", {}, "yields no text"),
        (b" \n\n \t", {}, "yields no text"),
        (
            b"some words\n" * 20,
            {"shard_tokens": 10_000},
            r"yields 221 tokens, which leaves nothing for training after 1 .* of 10000; choose --shard_tokens 11,",
        ),
        (
            b"some words\n" * 20,
            {"shard_tokens": 60, "val_shards": 9},
            "leaves nothing for training after 9 validation .* --shard_tokens 1, or more text",
        ),
        (b"\xff\xfe", {}, "not UTF-8 at byte 0"),
        (None, {}, "no such file or folder"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(tmp_path, text, options, message):
    """With a tokenizer that is there, so that the corpus is what fails."""
    train_tokenizer(["some words"], 257).save(tmp_path / "tokenizer")
    if text is not None:
        (tmp_path / "a.txt").write_bytes(text)
    options = {"tokenizer": str(tmp_path / "tokenizer"), **options}
    with pytest.raises(UserError, match=message):
        prepare(Recipe(Source(str(tmp_path / "a.txt")), **options), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.txt", "tokenizer"}


def test_a_folder_of_other_things_is_left_alone(corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a data folder"):
        prepare(recipe(corpus), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_uint32_where_the_vocabulary_needs_it(text_files, tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"%d" % i: 246 + i for i in range(10, 70_000)}
    large = ByteLevelTokenizer("gpt2", ranks, 70_246)
    monkeypatch.setattr("data_prep.tokenization.tokenizer.gpt2_tokenizer", lambda: large)
    with pytest.raises(UserError, match="the tokenizer has 70247 ids, uint16 holds 65536; use dtype uint32"):
        prepare(Recipe(Source(str(text_files)), dtype="uint16"), tmp_path / "small")
    assert not list(tmp_path.iterdir())
    manifest = prepare(Recipe(Source(str(text_files))), tmp_path / "out")
    tokens = np.load(tmp_path / "out" / manifest.shards[0].file)
    assert manifest.dtype == "uint32" and tokens.dtype == np.uint32 and tokens[0] == tokens.max() == 70_246


def test_the_manifest_says_where_the_data_is_from(corpus, undisturbed):
    fields = json.loads((undisturbed / "manifest.json").read_text())
    assert fields["format_version"] == 2 and fields["dtype"] == "uint16" and fields["shard_tokens"] == 100_003
    source = fields["source"]
    assert source["source"] == str(corpus) and source["files"] == 4 and fields["cleaning"] == []
    assert source["bytes"] == sum(path.stat().st_size for path in corpus.iterdir())
    assert fields["tokenizer"]["name"] == "bpe-301" and fields["tokenizer"]["vocab_size"] == 301
    own = hashlib.sha256((undisturbed / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    assert fields["tokenizer"]["sha256"] == own and fields["unfinished"] is None


def test_what_is_not_read_is_said_and_written(data_folder, tmp_path, monkeypatch, capsys):
    """In the last lines, also of a command that is repeated; a manifest from before it was counted is read."""
    (tmp_path / "texts").mkdir()
    for name in ("a.csv", "b.CSV", ".hidden.txt", "README.txt"):
        (tmp_path / "texts" / name).write_text("not read")
    (tmp_path / "texts" / "c.txt").write_text("some words " * 400)
    (tmp_path / "texts" / "d.txt").write_text("other words " * 400)
    words = ["data", "--source", "texts", "--tokenizer", str(data_folder / "tokenizer"), "--shard_tokens", "500"]
    monkeypatch.setattr(sys, "argv", ["prepare", *words])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main()
        assert "2 files read, 4 not: 2 .csv, 1 README.txt, 1 hidden\n" in capsys.readouterr().out
    file = tmp_path / "data" / "manifest.json"
    fields = json.loads(file.read_text())
    assert fields.pop("files_not_read") == {".csv": 2, "hidden": 1, "README.txt": 1}
    file.write_text(json.dumps(fields))
    main()
    assert "2 files read\n" in capsys.readouterr().out


def test_what_cleaning_has_done_is_taken_over(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "clean" / "web")
    counts = {"documents_in": 5, "documents_out": 4, "characters_in": 50, "characters_out": 40}
    step = {
        "step": "min_length",
        "settings": {"characters": 9},
        **counts,
        "sources": {"web": counts},
        "dropped": {},
        "examples": {},
    }
    (tmp_path / "clean" / "cleaning.json").write_text(json.dumps([step]))
    assert prepare(recipe(copy), tmp_path / "foreign").cleaning == [], "it lacks the configuration of a cleaning"
    (tmp_path / "clean" / "config.json").write_text("{}")
    assert list(map(dataclasses.asdict, prepare(recipe(copy), tmp_path / "data").cleaning)) == [step]


@pytest.mark.processes
def test_a_stream_of_the_hub_goes_on_where_it_was(corpus, tmp_path):
    """Killed in the second file, the next process reads no other; its revision is that of the first."""
    files = {}
    for i in (0, 1, 2):
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({"text": texts(2000, i)}), buffer, row_group_size=200)
        files[f"data/train-0000{i}-of-00003.parquet"] = buffer.getvalue().to_pybytes()
    train_tokenizer(texts(100), 301).save(tmp_path / "tokenizer")
    flags = ["--source", "user/corpus", "--tokenizer", tmp_path / "tokenizer", "--shard_tokens", "50001"]
    killed = tmp_path / "killed.py"
    killed.write_text(KILLED)

    def command(folder, *more, words=("-m", "data_prep.prepare"), exit_code=0):
        home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **home, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, *words, tmp_path / folder / "data", *flags, *more]
        return run_command(*words, cwd=ROOT, env=environment, exit_code=exit_code)

    def read() -> set[str]:
        return {r.rpartition("/")[2] for r in requests if r.startswith("GET") and "resolve" in r and "parquet" in r}

    with serve_dataset("user/corpus", files) as (endpoint, requests):
        command("one")
        assert len(read()) == 3
        total = len(Manifest.load(tmp_path / "one" / "data").shards)
        command("two", "fsync", str(total + total // 4), words=[killed], exit_code=-signal.SIGKILL)
        position = Manifest.load(tmp_path / "two" / "data").unfinished
        assert position.file == 1 and position.record + position.tokens > 0
        requests.clear()
        command("two")
        assert read() == {"train-00001-of-00003.parquet", "train-00002-of-00003.parquet"}
    assert contents(tmp_path / "one" / "data") == contents(tmp_path / "two" / "data")
    assert Manifest.read(tmp_path / "one" / "data").source.commit == "0123456789abcdef0123456789abcdef01234567"


def test_a_network_that_fails_is_tried_again(capsys):
    """A file system of `fsspec` that breaks off now and then; a block that was read is not read again."""
    import io

    import fsspec

    class Unreliable(fsspec.AbstractFileSystem):
        protocol = "unreliable"
        content, fails = b"", iter([])

        def info(self, path, **_):
            return {"name": path, "size": len(self.content), "type": "file"}

        def _open(self, path, **_):
            class File(io.BytesIO):
                def read(self, *args):
                    if next(Unreliable.fails, False):
                        raise TimeoutError("timed out")
                    return super().read(*args)

            return File(self.content)

    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    lines = [json.dumps({"text": f"{i} " + "x" * 5000}) for i in range(1000)]
    Unreliable.content, Unreliable.fails = (
        "\n".join(lines).encode(),
        iter([False] * 3 + [True, True] + [False] * 4 + [True]),
    )
    corpus = open_source(Source("unreliable://corpus/a.jsonl"))
    blocks = list(corpus.blocks(Position(), retry_delays=(0, 0)))
    assert [text.split()[0] for block in blocks for text in block.texts] == [str(i) for i in range(1000)]
    assert "timed out; attempt 2 in 0 s" in (output := capsys.readouterr().err) and "attempt 3" in output

    Unreliable.fails = iter([True] * 10)
    with pytest.raises(UserError, match=r"the network fails \(timed out\), 3 times in a row"):
        list(corpus.blocks(Position(), retry_delays=(0, 0)))


def test_commands_say_it_in_one_line(tmp_path):
    """In processes of their own, GPT-2's vocabulary neither cached nor reachable among them."""
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    (tmp_path / "a.txt").write_text("some words\n" * 1000)
    for words, message in (
        (["out", "--source", "a.txt"], "error: GPT-2's vocabulary is not in tiktoken's cache (TIKTOKEN_CACHE_DIR: "),
        (["out", "--sourc", "a.txt"], "python -m data_prep.prepare: error: "),
        (["out", "--source", "a.txt", "--tokenizr", "bpe"], "unknown '--tokenizr'; did you mean '--tokenizer'?"),
        (["out", "--source", "a.txt", "--tokenizer", "./none"], "error: tokenizer './none': "),
        (["out", "--source", "a.txt", "--where", "score"], "error: --where 'score': expected COLUMN OPERATOR VALUE"),
        (["out", "--source", "a.txt", "--workers", "0"], "error: workers=0 must be at least 1"),
        (["out", "--source", "a.txt", "--val_shards", "0"], "error: settings: val_shards=0: input should be greater"),
    ):
        command = [sys.executable, "-m", "data_prep.prepare", *words]
        done = run_command(*command, cwd=tmp_path, exit_code=2, env=environment)
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()
