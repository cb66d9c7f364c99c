"""Every command line of the project: its help, and that what the documents show of it exists."""

import os
import re
import shlex
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from conftest import DATA, ROOT, TINY_MODEL, needs_compiler, run_command
from forks import begin_command
from project import WITH_COMMANDS
from small_models import as_in_nanogpt

from data_prep.common.command_line import first_line
from training.settings.reading import parse_config

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in WITH_COMMANDS
    for path in (ROOT / package).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES_OF_USERS = ("LOGNAME", "USER", "LNAME", "USERNAME")  # that `getpass` reads
ADDS_OPTIONS = "extending.md"  # its examples add the options that they show
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


@cache
def help_of(module: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        code, text = begin_command(module, ["--help"], Path(folder)).ended()
    assert code == 0, text
    return text


def commands(text: str):
    """The words of each command of ours in the bash blocks of a page, by its module."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "training/train.py" in words:
                yield "training.train", words[words.index("training/train.py") + 1 :]
            elif "-m" in words and words[words.index("-m") + 1].startswith(tuple(f"{p}." for p in WITH_COMMANDS)):
                module = words[words.index("-m") + 1]
                yield module, words[words.index("-m") + 2 :]


@pytest.mark.parametrize("module", MODULES)
def test_help_reads_as_documentation(module):
    """Its task, each option once, and the defaults."""
    text = help_of(module)
    assert text.startswith("usage: ") and len(text.split("\n\n")[1]) > 20
    assert "None" not in text and "-- " not in text.replace("--name value", "")
    options = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(options) == len(set(options))


def test_options_on_the_pages_exist():
    shown = 0
    for page in PAGES:
        if page.name == ADDS_OPTIONS:
            continue
        for module, words in commands(page.read_text(encoding="utf-8")):
            for word in words:
                if word.startswith("--"):
                    shown += 1
                    option = word.partition("=")[0]
                    texts = [help_of(module)]
                    if module == "training.plot_schedule":  # which takes the settings of training
                        texts.append(help_of("training.train"))
                    assert re.search(rf"{option}\b", "".join(texts)), f"{page.name}: {module} has no {option}"
    assert shown > 60


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_presets_are_listed(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--list_presets"])
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"gpt2-124m +124,439,808 +12 +768 +12 +1,024 +524,288 +6\.0e-04", line) for line in lines)


TINY_CLEANING = """\
sources: {{mine: {texts}/*.txt}}
output: cleaned
tasks: 1
workers: 1
steps: [SymbolLinesFormatter]
"""
TINY_RUN = """\
{n_layer: 1, n_embd: 32, n_head: 2, n_positions: 32, batch_tokens: 32, per_device_train_batch_size: 1,
 val_tokens: 32, warmup_steps: 0, sample_every: 0}
"""
# Each command on tiny input, and what it must say; {run} is a finished run, {data} its data.
QUICK = {
    "data_prep.register": ("shards", "training and"),
    "data_prep.clean": ("clean.yaml", "cleaned"),
    "data_prep.contamination": ("{data} --against {hellaswag}", "of"),
    "data_prep.inspect": ("{data} --documents 1", "{data}"),
    "data_prep.prepare": ("mine --source {texts} --tokenizer bpe --vocab_size 300", "mine: "),
    "data_prep.verify": ("{data}", "is whole"),
    "eval.generate": ("{checkpoint} --prompt import --max_new_tokens 3", "import"),
    "eval.hellaswag": ("{checkpoint} --data {swag} --limit 2", "acc_norm"),
    "eval.loss": ("{checkpoint} --data {data}", "nats per token"),
    "eval.report": ("{run}", "report.html"),
    "modeling.import_checkpoint": ("ckpt.pt imported", "50,257 tokens"),
    "training.export_llmc": ("gpt2 model.bin", "model.bin"),
    "benchmarks.scaling": ("", "gpt3-175b"),
    "training.plot_schedule": ("--max_steps 20 --warmup_steps 2 --plot schedule.png", "20 steps"),
    "training.train": (
        "--data {data} {tiny} --max_steps 1 --warmup_steps 0 --batch_tokens 32 --per_device_train_batch_size 1",
        "saved",
    ),
}
# Those that take a minute: `-m slow`, as whoever changes what they measure runs them.
BENCHMARKS = {
    "benchmarks.tokenization": ("--megabytes 1 --repeats 1", "| tiktoken alone, processes |"),
    "benchmarks.evaluation": ("{checkpoint} --data {swag} --items 2 --new_tokens 4 --repeats 1", "items a second"),
    "benchmarks.training_step": ("--sizes quickstart --steps 1 --rounds 1 --precision no", "gpt-accelerate"),
    "benchmarks.data_loader": ("--data {data} --repeats 1 --seconds 0.1 --steps 2", "256 tokens"),
    "benchmarks.checkpoint_saving": ("--size quickstart --steps 1 --rounds 1", "in the background"),
    "benchmarks.gpu_trial": ("--minutes 30 --out trial", "- **micro_batch** works"),
    "benchmarks.busy_machine": ("--busy 0 1 --steps 1 --rounds 1", "| 1 | "),
    "benchmarks.time_to_loss": (
        "text.txt --vocab_size 300 --seeds 1 --recipe tiny.yaml --steps 10 --our_steps 10 --trainers build-nanogpt",
        "| gpt-accelerate |",
    ),
}
BY_ANOTHER = {"benchmarks.other_trainers"}  # by benchmarks.time_to_loss
ON_PAGES = {"eval.harness", "training.chat", "training.export_gguf", "training.compare"}
# They need a Hub to write to: tests/data_prep/sources/test_sources.py and tests/training/test_publish.py have one.
ON_THE_HUB = {"data_prep.push", "training.publish"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_run, data_folder, text_files, swag_file) -> dict[str, str]:
    """The inputs of the commands, by the names in braces."""
    import torch

    from modeling import GPTConfig, GPTModel

    here = tmp_path_factory.mktemp("inputs")
    (here / "clean.yaml").write_text(TINY_CLEANING.format(texts=text_files))
    (here / "tiny.yaml").write_text(TINY_RUN)
    (here / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    shards = here / "shards"
    shards.mkdir()
    shutil.copytree(data_folder / "tokenizer", shards / "tokenizer")
    for file in data_folder.glob("*.npy"):
        shutil.copy(file, shards)
    model = GPTModel(GPTConfig(vocab_size=50257, n_layer=1, n_head=2, n_embd=16, n_positions=8))
    model.save_pretrained(here / "gpt2")
    arguments = {"block_size": 8, "vocab_size": 50257, "n_layer": 1, "n_embd": 16, "n_head": 2, "bias": True}
    saved = {
        "model": as_in_nanogpt(model),
        "model_args": arguments,
        "iter_num": 7,
    }
    torch.save(saved, here / "ckpt.pt")
    (here / "data" / "evaluation").mkdir(parents=True)
    shutil.copy(swag_file, here / "data" / "evaluation" / "hellaswag_val.jsonl")
    data = shutil.copytree(data_folder, tmp_path_factory.mktemp("data") / data_folder.name)  # some write into it
    names = {"run": tiny_run.folder, "checkpoint": tiny_run.checkpoints[-1], "data": data, "texts": text_files}
    names |= {"swag": swag_file, "hellaswag": DATA / "hellaswag.jsonl", "tiny": " ".join(TINY_MODEL), "here": here}
    return {name: str(value) for name, value in names.items()}


def run_on_tiny_input(module: str, words: str, expected: str, inputs: dict[str, str], folder: Path) -> None:
    shutil.copytree(inputs["here"], folder, dirs_exist_ok=True)
    code, text = begin_command(module, shlex.split(words.format(**inputs)), folder).ended()
    assert code == 0, text
    assert expected.format(**inputs) in text


def test_every_command_is_run_somewhere():
    assert QUICK.keys() | BENCHMARKS.keys() | ON_THE_HUB | ON_PAGES | BY_ANOTHER == set(MODULES)
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"python -m {module} " in pages for module in ON_PAGES)


@pytest.mark.parametrize("module", QUICK)
def test_a_command_runs_on_tiny_input(module, inputs, tmp_path):
    run_on_tiny_input(module, *QUICK[module], inputs, tmp_path)


@pytest.mark.parametrize("module", [name for name in QUICK if QUICK[name][0]])
def test_an_empty_variable_is_refused(module, inputs, tmp_path):
    """`"$UNSET"` in the place of each value in turn: `.`, which is what an empty path is, would be taken for it."""
    shutil.copytree(inputs["here"], tmp_path, dirs_exist_ok=True)
    words = shlex.split(QUICK[module][0].format(**inputs))
    for place, word in enumerate(words):
        if word.startswith("--") or "--prompt" in words[:place][-1:]:
            continue
        before = set(tmp_path.rglob("*"))
        process = begin_command(module, [*words[:place], "", *words[place + 1 :]], tmp_path)
        code, text = process.ended()
        assert code != 0 and len(text.splitlines()) == 1, text
        assert "is empty" in text or module == "modeling.import_checkpoint", text  # it has no parser of ours
        assert set(tmp_path.rglob("*")) == before | {process.output}


def test_a_user_id_without_passwd_entry_has_a_home_and_a_name(tmp_path):
    """HOME is not set either: no folder "~" is made, and torch.compile's cache has torch 2.13's own name for it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid"
    )
    program = "import getpass, os; from data_prep.common.command_line import run\n"
    program += "run(lambda: print(os.path.expanduser('~'), getpass.getuser()))"
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", *NAMES_OF_USERS)}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_command(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    assert done.stdout == f"/ uid_{os.getuid()}\n"
    done = run_command(sys.executable, "-c", program, cwd=tmp_path, env=environment | {"HOME": "/x", "LOGNAME": "y"})
    assert done.stdout == "/x y\n"


@pytest.mark.processes
@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(("benchmarks.", "modeling."))])
def test_a_timeout_that_is_no_number_is_named(module, tmp_path):
    """Before libraries are loaded, which fail by it without its name."""
    environment = os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "abc", "HF_HUB_ETAG_TIMEOUT": "1.5", "PYTHONPATH": str(ROOT)}
    done = run_command(sys.executable, "-m", module, "--help", cwd=tmp_path, exit_code=2, env=environment)
    first, *named = done.stderr.splitlines()
    assert first == "error: 2 problems with the settings:" and not done.stdout
    assert [line.split()[1] for line in named] == ["HF_HUB_DOWNLOAD_TIMEOUT='abc'", "HF_HUB_ETAG_TIMEOUT='1.5'"]


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    """By the first folder of it that cannot be made, wherever in the chain of errors; another folder is not."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file" / "home"))
    for folder, named in (("file/home/hub/models", True), ("file/home", True), ("file/other", False)):
        with pytest.raises(ValueError) as caught:
            try:
                (tmp_path / folder).mkdir(parents=True)
            except OSError as error:
                raise ValueError("PermissionError at somewhere\nCommon causes: ...") from error
        assert first_line(caught.value).endswith("; set HF_HOME to a folder that can be written to") == named


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("module", BENCHMARKS)
def test_a_benchmark_runs_on_tiny_input(module, inputs, tmp_path):
    run_on_tiny_input(module, *BENCHMARKS[module], inputs, tmp_path)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")],
)
def test_threads_sleep_soon_unless_the_user_says_otherwise(settings, expected, tmp_path):
    """As libgomp itself says."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = others | {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)} | settings
    program = "from data_prep.common.command_line import run; run(lambda: __import__('torch'))"
    done = run_command(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr
