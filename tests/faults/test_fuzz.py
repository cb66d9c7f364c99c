"""Files of ours, changed at random: what reads them succeeds, or says what is wrong in one line.

The short form draws a few cases of each file; the long one (`-m slow`) more than two thousand, and some of them against
real processes. Seeded: the cases are the same each time.
"""

import contextlib
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL
from forks import begin
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_models import as_in_nanogpt

from data_prep.clean import read_config
from data_prep.common.command_line import UserError
from data_prep.contamination import contamination, record, recorded
from data_prep.inspect import sequences
from data_prep.sharding.manifest import Manifest
from data_prep.sources.opening import open_source
from data_prep.sources.source import Source
from data_prep.tokenization.tokenizer import hf_tokenizer, load_tokenizer
from data_prep.verify import verify
from eval.common.models import load_model
from eval.reporting import sections
from eval.reporting.card import model_card
from eval.reporting.records import read_run
from modeling import GPTConfig, GPTModel
from modeling.import_checkpoint import import_checkpoint
from training.checkpointing.store import complete_checkpoints, find_corruption, load_state
from training.engine.data import load_data
from training.monitoring.log import RunLog
from training.publish import _settings as published_settings
from training.settings.reading import load_config, parse_config

SECONDS, BYTES = 10, 2 << 30
VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, -1e308, math.nan, math.inf),
    *("", "x", "0", "../x", "/etc/passwd", "x" * 5000, "\0", "caf\u00e9\u2028"),
    *([], [0], [[]], {}, {"": 0}, {"step": -1}, [None] * 1000),
]
GARBAGE = [
    *(b"", b"\0", b"\xff\xfe", b"{", b"[" * 100_000, b'{"a":' * 20_000, b"\n\n\n", b"null", b"NaN", b"\x80" * 5000),
    *(b"&a [*a, *a]", b"a: &x [1]\nb: *x", b"- " * 5000, b"1e999", b"\xef\xbb\xbf{}", b"PK\x03\x04"),
    b"!!python/name:os.system",
]
KINDS = ["value", "value", "value", "remove", "add", "repeat", "bytes", "cut", "insert", "whole"]


@st.composite
def changes(draw) -> Callable[[bytes], bytes]:
    """A change to the bytes of a file: to a value in its JSON or YAML, or to the bytes themselves."""
    kind = draw(st.sampled_from(KINDS))
    place, value = draw(st.integers(0, 10**6)), draw(st.sampled_from(VALUES))
    garbage = draw(st.sampled_from(GARBAGE))

    def change(content: bytes) -> bytes:
        if kind == "whole":
            return garbage
        if kind == "cut":
            return content[: place % (len(content) + 1)]
        if kind in ("bytes", "insert"):
            at = place % (len(content) + 1)
            return content[:at] + garbage[:50] + content[at + (len(garbage[:50]) if kind == "bytes" else 0) :]
        try:
            tree = json.loads(content)
        except ValueError:
            lines = content.splitlines(keepends=True) or [b""]
            at = place % len(lines)  # of JSON lines, YAML, a log
            lines[at] = {"remove": b"", "repeat": lines[at] * 2}.get(kind, json.dumps(value).encode() + b"\n")
            return b"".join(lines)
        return json.dumps(_changed(tree, kind, place, value)).encode()

    change.__name__ = f"{kind}_{place}_{str(value)[:20]}"
    return change


def _changed(tree, kind: str, place: int, value):
    """The tree with one of its branches changed."""
    branches = list(_branches(tree))
    parent, key = branches[place % len(branches)] if branches else (None, None)
    if parent is None:
        return value
    if kind == "remove":
        del parent[key]
    elif kind == "repeat" and isinstance(parent, list):
        parent.append(parent[key])
    elif kind == "add" and isinstance(parent, dict):
        parent["of_the_future"] = value
    else:
        parent[key] = value
    return tree


def _branches(tree) -> Iterator[tuple]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _branches(value)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_run, data_folder) -> Path:
    """A run and its data, to change files of, and a file of each other kind."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(data_folder, folder / "small")
    shutil.copytree(tiny_run.folder, folder / "runs" / "tiny")
    (folder / "set.txt").write_text("one two three\n\nfour five six seven eight nine ten eleven twelve thirteen\n")
    record(folder / "small", contamination(folder / "small", [folder / "set.txt"]))
    checkpoints = folder / "runs" / "tiny" / "checkpoints"
    scores = {"acc,none": 0.5, "acc_stderr,none": "N/A"}
    results = {"results": {"a": scores}, "n-samples": {"a": {"original": 9, "effective": 5}}}
    (checkpoints / "step_00000020.lm_eval.json").write_text(json.dumps(results))
    counts = {"documents_in": 5, "documents_out": 4, "characters_in": 50, "characters_out": 40}
    step = {"step": "x", "settings": {"a": 1}, **counts, "sources": {"w": counts}, "dropped": {"y": 1}}
    (folder / "cleaned").mkdir()
    (folder / "cleaned" / "config.json").write_text("{}")
    (folder / "cleaned" / "cleaning.json").write_text(json.dumps([step]))
    (folder / "cleaned" / "x.jsonl").write_text('{"text": "a"}\n{"text": "b", "n": 1}\n')
    (folder / "clean.yaml").write_text(
        f"sources: {{x: {folder}/cleaned/x.jsonl}}\noutput: {folder}/out\n"
        "steps:\n- {step: RegexFilter, regex_exp: xyz}\n- MinhashDedup\n"
    )
    model = GPTModel(GPTConfig(vocab_size=300, n_layer=1, n_head=2, n_embd=16, n_positions=8))
    sizes = {"block_size": 8, "vocab_size": 300, "n_layer": 1, "n_embd": 16, "n_head": 2, "bias": True}
    torch.save({"model": as_in_nanogpt(model), "model_args": sizes, "iter_num": 7}, folder / "ckpt.pt")
    return folder


def read_data(world: Path) -> None:
    list(verify(world / "small"))
    manifest = Manifest.read(world / "small")
    written = json.loads((world / "small" / "manifest.json").read_text())
    # What was read is what stands there: nothing is dropped, nothing is made up but what has a default.
    read = json.loads(json.dumps(asdict(manifest)))
    assert {name: read[name] for name in written} == written or written["shards"] == read["shards"]
    config = parse_config(["--data", str(world / "small"), *TINY_MODEL])
    load_data(config).batches(config, "train").sequences(0, 2)


def read_tokenizer(world: Path) -> None:
    hf_tokenizer(world / "small" / "tokenizer")
    load_tokenizer(world / "small" / "tokenizer").encode(["some text"])


def read_checkpoint(world: Path) -> None:
    for checkpoint in complete_checkpoints((world / LAST).parent):
        find_corruption(checkpoint)
    load_state(world / LAST)


def read_run_files(world: Path) -> None:
    run = world / "runs" / "tiny"
    published_settings(run)
    run_record = read_run(run)
    for part in (sections.data, sections.environment, sections.samples):
        part(run_record)
    sections.settings([run_record])
    model_card(run_record, 20, world / LAST, "user/x", "mit", [])
    kept = {name: (run / name).read_bytes() for name in ("log.txt", "metrics.jsonl", "samples.jsonl")}
    RunLog(run, 10, 20, 10, enabled=True).finish()
    for name, content in kept.items():
        (run / name).write_bytes(content)


def read_settings(world: Path) -> None:
    run = world / "runs" / "tiny"
    load_config(["--output_dir", str(run), "--resume_from_checkpoint"], 1)
    load_config([str(run / "config.yaml")], 1)
    parse_config(["--resume_from_checkpoint", str(world / LAST), "--cooldown_steps", "3"])
    list(sequences([str(world / "small")], run, 0, 1))


def read_cleaning(world: Path) -> None:
    corpus = open_source(Source(str(world / "cleaned")))
    corpus.cleaning()
    list(corpus.documents())


def read_peer_file(world: Path) -> None:
    try:
        import_checkpoint(world / "ckpt.pt")
    except ValueError as error:  # its own kind of one-line error: `modeling` knows nothing of ours
        raise UserError(str(error)) from error


def read_weights(world: Path) -> None:
    load_model(str(world / LAST))


DATA_FILES = ("manifest.json", "small_train_000001.npy", "small_val_000000.npy")
RUN_FILES = ("environment.json", "metrics.jsonl", "samples.jsonl", "log.txt")
LAST = "runs/tiny/checkpoints/step_00000020"
FILES = {
    **dict.fromkeys([f"small/{name}" for name in DATA_FILES], read_data),
    **{f"small/tokenizer/{name}.json": read_tokenizer for name in ("tokenizer", "tokenizer_config")},
    "small/contamination.json": lambda world: recorded(world / "small"),
    **{f"{LAST}/{name}": read_checkpoint for name in ("COMPLETE", "training_state/state.json")},
    **{f"{LAST}/{name}": read_weights for name in ("config.json", "model.safetensors")},
    f"{LAST}.lm_eval.json": read_run_files,
    "runs/tiny/config.yaml": read_settings,
    **{f"runs/tiny/{name}": read_run_files for name in RUN_FILES},
    **{f"cleaned/{name}": read_cleaning for name in ("cleaning.json", "x.jsonl")},
    "clean.yaml": lambda world: read_config(world / "clean.yaml"),
    "ckpt.pt": read_peer_file,
}


@contextlib.contextmanager
def changed(file: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    content = file.read_bytes()
    file.write_bytes(change(content))
    try:
        yield
    finally:
        file.write_bytes(content)


class Hang(BaseException):
    """Not an `Exception`, which the code under test may turn into one line."""


def ends_well(world: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Within the time and the memory: success, or one line."""

    def hangs(*_: object) -> None:
        raise Hang(f"{name}: more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    memory = forget_peak()
    try:
        with changed(world / name, change):
            FILES[name](world)
    except (UserError, OSError) as error:
        text = str(error)
        assert text and "Traceback" not in text
        assert all(line.startswith("  - ") for line in text.split("\n")[1:]) or "problems with" in text, text
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert (peak := peak_memory()) - memory < BYTES, f"{name}: {peak:,} bytes"


def forget_peak() -> int:
    """Let the peak of this process's memory count from now on; what it is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def whole(garbage: bytes) -> Callable[[bytes], bytes]:
    return lambda _: garbage


@pytest.mark.parametrize("cases", [3, pytest.param(110, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_read_or_refused_in_one_line(world, name, cases, capsys):
    FILES[name](world)  # as it is

    @settings(max_examples=cases, **QUIET)
    @example(whole(b""))
    @example(whole(b"[" * 100_000))
    @given(changes())
    def check(change: Callable[[bytes], bytes]) -> None:
        ends_well(world, name, change)

    check()


REAL = [
    *("small/manifest.json", "small/small_train_000001.npy", "small/tokenizer/tokenizer_config.json"),
    *("runs/tiny/config.yaml", "runs/tiny/metrics.jsonl", f"{LAST}/COMPLETE", f"{LAST}/training_state/state.json"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_run_on_changed_files_goes_on_or_says_why_not(world, tmp_path, name):
    @settings(max_examples=6, **QUIET)
    @given(changes())
    def check(change: Callable[[bytes], bytes]) -> None:
        here = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(world, here)
        file = here / name
        file.write_bytes(change(file.read_bytes()))
        words = "--run_name tiny --resume_from_checkpoint --max_steps 22 --override max_steps --data small"
        code, text = begin(words.split(), here).ended()
        assert "Traceback" not in text, text
        assert code in (0, 2) and (code == 0 or "error: " in text)

    check()
