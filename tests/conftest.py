"""Data and runs that several tests look at."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"  # excerpts of real data, each with its licence
WHOLE_SETS = ROOT.parent / "shared" / "data"  # whole evaluation sets, for the long forms
# A vocabulary that is no multiple of 128, as GPT-2's 50257 is none.
VOCAB_SIZE = 601
TINY_MODEL = ["--n_layer", "2", "--n_embd", "32", "--n_head", "4", "--n_positions", "32"]

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on the CPU"
)


@pytest.fixture(scope="session")
def whole_sets() -> Path:
    """Whole evaluation sets beside the repository; the long forms that need them skip where they are not."""
    if not WHOLE_SETS.is_dir():
        pytest.skip(f"needs {WHOLE_SETS} with hellaswag_val.jsonl in it: the whole set, not tests/data's excerpt")
    return WHOLE_SETS


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> Path:
    """A folder of real text: some modules of the standard library, as .txt files."""
    import email
    import json as json_package

    folder = tmp_path_factory.mktemp("text")
    for package in (json_package, email):
        for path in sorted(Path(package.__file__).parent.glob("*.py")):
            text = path.read_text(encoding="utf-8")
            (folder / f"{package.__name__}_{path.stem}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory, text_files) -> Path:
    """Some 150,000 tokens in shards of 20,011, so that no batch ends where a shard does."""
    from data_prep.prepare import Recipe, prepare
    from data_prep.sources.source import Source

    folder = tmp_path_factory.mktemp("data") / "small"
    prepare(Recipe(Source(str(text_files)), tokenizer="bpe", vocab_size=VOCAB_SIZE, shard_tokens=20_011), folder)
    return folder


@pytest.fixture(scope="session")
def other_data(tmp_path_factory, data_folder) -> Path:
    """A second folder of the same tokenizer, small enough for several epochs."""
    from data_prep.prepare import Recipe, prepare
    from data_prep.sources.source import Source

    folder = tmp_path_factory.mktemp("other")
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"item {i} of many, with {i * 7} words in it\n" * 20)
    prepare(Recipe(Source(str(folder)), tokenizer=str(data_folder / "tokenizer"), shard_tokens=2_000), folder / "data")
    return folder / "data"


@pytest.fixture(scope="session")
def swag_file(tmp_path_factory) -> Path:
    """Five items in HellaSwag's format, short enough for the tiny model's context."""
    item = {"activity_label": "A", "ctx": "the a", "ctx_a": "the", "ctx_b": "a", "endings": ["b", "of it", "in ("]}
    file = tmp_path_factory.mktemp("swag") / "swag.jsonl"
    file.write_text("".join(json.dumps({**item, "label": n % 3}) + "\n" for n in range(5)))
    return file


@dataclass
class Finished:
    """A run that a process of its own has made."""

    folder: Path
    stdout: str

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.folder / "checkpoints").iterdir() if path.is_dir())

    def metrics(self) -> dict[int, dict]:
        """The lines of metrics.jsonl by step; a step that stands twice is an error."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        by_step = {line["step"]: line for line in lines}
        assert len(by_step) == len(lines)
        return by_step

    def losses(self) -> list[float]:
        """The training losses of all steps, in order."""
        metrics = self.metrics()
        steps = sorted(step for step, line in metrics.items() if "loss" in line)
        assert steps == list(range(len(steps)))
        return [metrics[step]["loss"] for step in steps]


def run_command(
    *words: str, cwd: Path, exit_code: int | None = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a command in a process of its own, and check how it ended; None for any failure."""
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    ended_well = done.returncode == exit_code if exit_code is not None else done.returncode != 0
    assert ended_well, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def launch(
    *flags: str,
    cwd: Path,
    launch_file: str = "cpu",
    options: tuple[str, ...] = (),
    exit_code: int | None = 0,
    script: str = "training/train.py",
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """`accelerate launch --config_file accelerate_configs/LAUNCH_FILE.yaml SCRIPT FLAGS`, from `cwd`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    files = ["--config_file", ROOT / "accelerate_configs" / f"{launch_file}.yaml", *options]
    return run_command(*launcher, *files, ROOT / script, *flags, cwd=cwd, exit_code=exit_code, env=env)


@pytest.fixture(scope="session")
def train(tmp_path_factory, data_folder):
    """Train the tiny model on the small data in real processes: float32, sequential, 512 tokens a step; started by
    Accelerate where an Accelerate config is named."""
    from forks import begin

    folder = tmp_path_factory.mktemp("runs")
    words = "--mixed_precision no --order sequential --sample_every 0 --batch_tokens 512 --optim adamw "
    words += "--learning_rate 1e-2 --val_tokens 4096 --warmup_steps 3"
    fixed = ["--data", data_folder, *words.split(), *TINY_MODEL]

    def start(name: str, *flags: str, cwd: Path = folder, launch_file: str | None = None) -> Finished:
        words = ["--run_name", name, *fixed, *flags]
        if launch_file is None:
            return begin(words, cwd).finished(name)
        return Finished(cwd / "runs" / name, launch(*words, cwd=cwd, launch_file=launch_file).stdout)

    return start


@pytest.fixture(scope="session")
def short_steps(data_folder) -> list[str]:
    """The flags of a run of the tiny model on the small data: float32, 512 tokens a step, no samples."""
    words = "--mixed_precision no --optim adamw --batch_tokens 512 --per_device_train_batch_size 8 --val_tokens 2048 "
    words += "--warmup_steps 1 --sample_every 0"
    return ["--data", str(data_folder), *TINY_MODEL, *words.split()]


@pytest.fixture(scope="session")
def tiny_run(train) -> Finished:
    """20 steps, two micro-batches each, validated every 5 steps."""
    flags = ["--max_steps", "20", "--per_device_train_batch_size", "8", "--eval_steps", "5", "--save_steps", "5"]
    return train("tiny", *flags)


def pytest_configure() -> None:
    # One thread for the tests of this process: they run beside each other, and threads of several only wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Runs in processes of their own have as many threads as there are cores, and wait for each other: without spinning.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"
