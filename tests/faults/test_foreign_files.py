"""Foreign files are neither changed, nor removed, nor taken for ours."""

import hashlib
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
from forks import begin
from plants import die, in_step, online, saves_that_fail
from standin_hub import serve

pytestmark = pytest.mark.processes

NEAR_NAMES = [
    *("step_best", "step_00000006_gguf", "step_00000012.bak", "step_6_keep", "step_00000009_copy", "step_6", "best"),
    *("step_000000060", "step_0000006", "Step_00000006", "step_00000006 ", "step_00000006.lm_eval", "damaged_step_6"),
    *(".step_6.partial", ".step_00000006.part", ".step_00000006.partial.bak", "COMPLETE", "training_state", "hub"),
    *("report.md.bak", "my_report.html", "loss2.png", "notes.txt", "metrics.jsonl.old", "log.txt~"),
    *(".uploading_step_6", "mine.md", "loss_annotated.png"),
]


@pytest.fixture(scope="session")
def flags(short_steps) -> list[str]:
    words = "--eval_steps 3 --save_steps 3 --save_total_limit 1 --lr_scheduler_type wsd --run_name run"
    return [*short_steps, *words.split()]


@pytest.fixture(scope="module")
def six_steps(flags, tmp_path_factory) -> Path:
    """The folder of a finished run of six steps."""
    return begin([*flags, "--max_steps", "6"], tmp_path_factory.mktemp("six")).finished("run").folder


@pytest.fixture
def six(six_steps, tmp_path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(six_steps, tmp_path / "runs" / "run")


def contents(folder: Path) -> dict[str, str]:
    """The hash of each file, the target of each link, and all folders."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def salt(run: Path) -> dict[str, str]:
    """Put a hundred foreign files, folders and links, with names near ours, into a run's folder; its contents then."""
    rng = random.Random(0)
    folders = [run, run / "checkpoints", run / "report", run / "hub"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    left = 100
    while left:
        path = rng.choice(folders) / (rng.choice(NEAR_NAMES) + rng.choice(["", "", ".txt", "_old", "2"]))
        if os.path.lexists(path):
            continue
        left -= 1
        kind = rng.choice(["file", "folder", "checkpoint", "link"])
        if kind == "file":
            path.write_bytes(rng.randbytes(rng.randrange(200)))
        elif kind == "link":
            path.symlink_to("step_00000003")
        else:
            path.mkdir()
            (path / "results.json").write_text(json.dumps(rng.random()))
            if kind == "checkpoint":  # a copy that somebody has made, sentinel included
                (path / "COMPLETE").write_text("{}")
                (path / "training_state").mkdir()
    return contents(run)


def test_nothing_foreign_is_touched(flags, tmp_path):
    """Training, resuming, pruning, preflight, publishing and a damaged checkpoint."""
    run = tmp_path / "runs" / "run"
    before = salt(run)
    common = [*flags, "--auto_resume"]

    def check(what: str) -> None:
        assert not (changed := before.items() - contents(run).items()), f"{what}: {changed}"

    begin([*common, "--max_steps", "12"], tmp_path, partial(in_step, 7, 0, die)).ended_with(-9)
    check("killed")
    begin([*common, "--max_steps", "12"], tmp_path).finished("run")
    check("resumed and pruned")
    begin([*common, "--max_steps", "15", "--preflight"], tmp_path).ended_with(0)
    check("preflight")
    weights = run / "checkpoints" / "step_00000012" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    more = [*common, "--max_steps", "15", "--override", "max_steps"]
    with serve() as hub:
        again = [*more, "--push_to_hub", "--hub_model_id", "user/salted", "--hub_strategy", "all"]
        code, text = begin(again, tmp_path, online, hub.environment()).ended()
        assert "is damaged (" in text, text
        if code:  # the best was the damaged one: nothing whole is left, and nothing is begun anew
            assert "has no complete checkpoint to resume from" in text
    check("a damaged checkpoint, and publishing")


@pytest.mark.parametrize("name", ["..", ".", "", " ", "a/b", "../x", "/tmp/x", ".hidden", "link", "\0"])
@pytest.mark.parametrize("more", [(), ("--preflight",)], ids=["run", "preflight"])
@pytest.mark.parametrize("setting", ["run_name", "output_dir"])
def test_a_run_has_a_plain_name_below_its_place(short_steps, tmp_path, name, more, setting, monkeypatch):
    from data_prep.common.command_line import UserError
    from training.settings.reading import load_config

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(elsewhere)
    monkeypatch.chdir(tmp_path)
    if setting == "output_dir" and name in ("a/b", "/tmp/x", "../x", "."):  # plain names at their ends
        load_config([*short_steps, "--output_dir", f"runs/{name}", *more], 1)
        return
    value = name if setting == "run_name" or not name.strip() else f"runs/{name}"
    with pytest.raises(UserError, match=rf"{setting}(=|: is empty)"):
        load_config([*short_steps, f"--{setting}", value, *more], 1)


def test_a_dangerous_name_deletes_nothing(flags, tmp_path):
    """As an unset variable of the shell gives it, in a place where there are other runs."""
    for folder in ("runs/precious", "report", "checkpoints/step_00000001"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "COMPLETE").write_text("mine")
    before = contents(tmp_path)
    for more in ([], ["--preflight"]):
        text = begin([*flags, "--run_name", "..", *more], tmp_path).ended_with(2)
        assert "run_name" in text and len(text.splitlines()) == 1, text
    assert {name: state for name, state in contents(tmp_path).items() if "output_" not in name} == before


def test_a_preflight_leaves_what_it_has_not_made(flags, tmp_path):
    place = tmp_path / "runs" / ".preflight" / "run"
    (place / "checkpoints").mkdir(parents=True)
    (place / "checkpoints" / "mine").write_text("precious")
    text = begin([*flags, "--preflight"], tmp_path).ended_with(2)
    assert "is in the way of the preflight" in text, text
    assert (place / "checkpoints" / "mine").read_text() == "precious"


def test_a_killed_preflight_does_not_block_the_next(flags, tmp_path):
    words = [*flags, "--preflight"]
    begin(words, tmp_path, die_in_preflight).ended_with(-9)
    assert (tmp_path / "runs" / ".preflight" / "run").exists()
    assert "every part works" in begin(words, tmp_path).ended_with(0)
    assert not (tmp_path / "runs" / ".preflight" / "run").exists()


def die_in_preflight() -> None:
    from training import preflight

    preflight.find_corruption = lambda folder: die()


@pytest.mark.parametrize("step", [3, 6])
def test_a_folder_in_the_place_of_a_checkpoint_is_left_there(flags, tmp_path, step):
    """The run says so, and ends with an error if it was its first or its last."""
    name = f"step_{step:08d}"
    mine = tmp_path / "runs" / "run" / "checkpoints" / name
    mine.mkdir(parents=True)
    (mine / "results.json").write_text("precious")
    text = begin([*flags, "--max_steps", "6"], tmp_path, partial(saves_that_fail, 0)).ended_with(2)
    assert f"{name} is in the way: it was not made by this program" in text, text
    assert f"warning: runs/run/checkpoints/{name} was not made by this program; step {step} cannot be saved" in text
    assert (mine / "results.json").read_text() == "precious" and len(list(mine.iterdir())) == 1


def test_a_copy_of_a_checkpoint_does_not_roll_a_run_back(flags, six, tmp_path):
    last = six / "checkpoints" / "step_00000006"
    for copy in ("step_6_keep", "step_00000009_copy", "step_00000006.bak"):
        shutil.copytree(last, last.parent / copy)
    (last.parent / "step_latest").symlink_to(last.name)
    more = ["--resume_from_checkpoint", "--max_steps", "9", "--override", "max_steps"]
    assert "from step 6" in begin([*flags, *more], tmp_path).ended_with(0)
    left = {path.name for path in last.parent.iterdir()}
    assert {"step_6_keep", "step_00000009_copy", "step_00000006.bak", "step_latest"} < left


@pytest.mark.parametrize("how", ["damaged", "removed", "a file", "a broken link"])
def test_a_run_that_has_saved_is_never_begun_anew_unasked(flags, six, tmp_path, how):
    words = [*flags, "--max_steps", "6"]
    log, checkpoints = (six / "metrics.jsonl").read_bytes(), six / "checkpoints"
    if how == "damaged":
        for weights in checkpoints.glob("*/model.safetensors"):
            weights.write_bytes(b"")
    else:
        shutil.rmtree(checkpoints)
        if how == "a file":
            checkpoints.write_text("")
        elif how == "a broken link":
            checkpoints.symlink_to("nowhere")
    for _ in range(2):  # the first start reports it, and so does every other
        text = begin([*words, "--auto_resume"], tmp_path).ended_with(2)
        assert "error: " in text and (six / "metrics.jsonl").read_bytes() == log
        assert how != "damaged" or "no complete checkpoint to resume from; remove that folder to start anew" in text
    begin(words, tmp_path).ended_with(2)


def test_nothing_but_a_tokenizer_comes_from_the_tokenizer_folder(flags, data_folder, tmp_path):
    data = shutil.copytree(data_folder, tmp_path / "data")
    for name in ("model.safetensors", "evil.py", "COMPLETE", "config.json", "README.md", "pytorch_model.bin"):
        (data / "tokenizer" / name).write_bytes(b"{}")
    (data / "tokenizer" / "training_state").mkdir()
    (data / "tokenizer" / "training_state" / "state.json").write_text("{}")
    words = [*flags, "--data", data, "--auto_resume"]
    run = begin([*words, "--max_steps", "3"], tmp_path).finished("run")
    (checkpoint,) = run.checkpoints
    assert not {"evil.py", "README.md", "pytorch_model.bin"} & {path.name for path in checkpoint.iterdir()}
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "gpt2"
    assert (checkpoint / "model.safetensors").stat().st_size > 10_000
    more = begin([*words, "--max_steps", "6", "--override", "max_steps"], tmp_path).finished("run")
    assert "from step 3" in more.stdout
