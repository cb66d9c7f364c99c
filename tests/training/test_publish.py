"""From a run to the Hub: against a stand-in that speaks its protocol, and fails."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_MODEL, Finished, launch, run_command
from forks import begin
from plants import die, in_step, online, wait_until_gone
from standin_hub import StandIn, serve

from data_prep.common.hub import repository_problem
from modeling import GPTModel
from training.checkpointing.store import complete_checkpoints, prune_checkpoints, step_of
from training.publishing import Uploads, pending, queue_entry
from training.settings.reading import parse_config

pytestmark = pytest.mark.clients  # of the Hub

LOADING = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from modeling import GPTModel
name, revision, output, card = sys.argv[1:]
exec(open(card).read().split("```python")[1].split("```")[0])  # its own way of using the model
tokens = torch.arange(1, 25)[None]
kinds = (GPTModel, AutoModelForCausalLM)
logits = [kind.from_pretrained(name, revision=revision).eval()(tokens).logits for kind in kinds]
words = AutoTokenizer.from_pretrained(name, revision=revision).decode([5, 6])
torch.save({"logits": logits, "words": words}, output)
"""


@pytest.fixture
def recipe(data_folder, swag_file):
    common = ["--data", data_folder, *TINY_MODEL, "--batch_tokens", "512", "--mixed_precision", "no"]
    common += ["--learning_rate", "1e-2", "--warmup_steps", "3", "--save_total_limit", "9"]
    common += ["--max_steps", "20", "--save_steps", "5", "--eval_steps", "5", "--val_tokens", "4096"]
    common += ["--sample_every", "10", "--sample_tokens", "4", "--hellaswag_every", "10", "--hellaswag_data", swag_file]
    return lambda name, *flags: ["--run_name", name, *common, *flags]


def command(module: str, *words: object, hub: StandIn, cwd: Path, exit_code: int = 0) -> str:
    """The output of `python -m MODULE WORDS`, with the stand-in as the Hub."""
    environment = os.environ | hub.environment() | {"HF_HOME": str(cwd / "cache")}
    done = run_command(sys.executable, "-m", module, *words, cwd=cwd, env=environment, exit_code=exit_code)
    return done.stdout + done.stderr


def loaded(repository: str, revision: str, hub: StandIn, cwd: Path) -> dict:
    """The logits of GPTModel and of stock transformers, in a fresh process that has the name and nothing else."""
    environment = os.environ | hub.environment() | {"HF_HOME": str(cwd / "cache")}
    place = hub.repositories[f"models/{repository}"]
    (cwd / "card.md").write_bytes(place.commits[place.branches["main"]]["README.md"])
    words = [repository, revision, cwd / "out.pt", cwd / "card.md"]
    run_command(sys.executable, "-c", LOADING, *words, cwd=cwd, env=environment)
    return torch.load(cwd / "out.pt")


def test_trained_killed_resumed_published_and_loaded_by_name(recipe, tmp_path):
    """Every checkpoint is there under its step, as it was saved."""
    with serve() as hub:
        flags = [
            "--push_to_hub",
            "--hub_model_id",
            "user/killed",
            "--hub_strategy",
            "all",
            "--hub_revisions",
            "--auto_resume",
        ]
        argv, environment = recipe("killed", *flags), hub.environment()
        code, _ = begin(argv, tmp_path, partial(online, partial(in_step, 12, 0, die)), environment).ended()
        assert code == -9
        run = begin(argv, tmp_path, online, environment).finished("killed")
        repository = hub.repositories["models/user/killed"]
        assert sorted(repository.tags) == [path.name for path in run.checkpoints]
        assert repository.branches["main"] == repository.tags["step_00000020"]
        assert "step     20  published http://127.0.0.1" in run.stdout
        assert not pending(run.folder)

        found = loaded("user/killed", "step_00000010", hub, tmp_path)
        saved = GPTModel.from_pretrained(run.checkpoints[1]).eval()(torch.arange(1, 25)[None]).logits
        assert torch.equal(found["logits"][0], saved)
        torch.testing.assert_close(found["logits"][1], saved, rtol=0, atol=1e-5)

        files = repository.commits[repository.tags["step_00000010"]]
        assert not [name for name in files if "training_state" in name or name == "COMPLETE"]
        settings = yaml.safe_load(files["training_config.yaml"])
        assert settings["max_steps"] == 20 and "push_to_hub" not in settings  # for whoever runs it again
        assert (
            parse_config(["--resume_from_checkpoint", str(run.checkpoints[1]), "--run_name", "b"]).hub.hub_model_id
            is None
        )
        loss = run.metrics()[10]["val_loss"]
        assert f"| Validation loss, nats per token | {loss:.4f} |" in files["README.md"].decode()
        assert f"{run.metrics()[15]['val_loss']:.4f}" not in files["README.md"].decode()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("refused", "user/failing: the Hub does not know the token; make one that may write at https://"),
        pytest.param("errors", "the network fails (Server error '500 Internal", marks=pytest.mark.slow),
        pytest.param("hang", "the network fails (timed out), 4 times", marks=pytest.mark.slow),
        pytest.param("gone", "the network fails ([Errno 111] Connection refused), 4 times", marks=pytest.mark.slow),
    ],
)
def test_a_hub_that_fails_does_not_touch_the_run(recipe, tmp_path, what, message):
    """The losses are those of a run without it; the end says what to do, and that works once the Hub does."""
    alone = begin(recipe("alone"), tmp_path).finished("alone")
    hub = StandIn()
    with serve(hub):
        port = int(hub.endpoint.rpartition(":")[2])
        if what == "refused":
            hub.token = "another"
        elif what != "gone":
            hub.failing = {"errors": 500, "hang": "hang"}[what]
        plant = partial(online, partial(in_step, 12, 0, partial(wait_until_gone, port)) if what == "gone" else None)
        training = begin(
            recipe("failing", "--push_to_hub", "--hub_model_id", "user/failing"), tmp_path, plant, hub.environment()
        )
        if what != "gone":
            run = training.finished("failing")
    if what == "gone":
        run = training.finished("failing")
    assert run.losses() == alone.losses()
    *_, last = (line for line in run.stdout.splitlines() if "published" in line)
    assert message in last
    assert last.endswith("this tries again: python -m training.publish runs/failing")
    assert "report           runs/failing/report/report.html" in run.stdout
    assert hub.environment()["HF_TOKEN"] not in run.stdout
    assert pending(run.folder) == run.checkpoints[-1:]  # the others were overtaken

    hub.failing, hub.token = None, StandIn.token
    with serve(hub):
        assert "step     20  published " in command("training.publish", "runs/failing", hub=hub, cwd=tmp_path)
        content = hub.repositories["models/user/failing"].commits
        assert (run.checkpoints[-1] / "model.safetensors").read_bytes() == list(content.values())[-1][
            "model.safetensors"
        ]


def test_what_is_published(recipe, tmp_path):
    """By strategy; by name; again, which changes nothing; and under the tag of a step that has become another."""
    run = begin(recipe("done"), tmp_path).finished("done")
    other = begin(recipe("other", "--seed", "5", "--max_steps", "5"), tmp_path).finished("other")
    with serve() as hub:
        output = command("training.publish", run.folder, hub=hub, cwd=tmp_path, exit_code=2)
        assert "has no hub_model_id; name the repository: --hub_model_id USER/NAME" in output
        to = ["--hub_model_id", "user/done", "--hub_license", "apache-2.0"]
        output = command("training.publish", run.folder, *to, "--step", "7", hub=hub, cwd=tmp_path, exit_code=2)
        assert "step=7: " in output
        config = run.folder / "config.yaml"  # the best is the last, of which its own checkpoint does not know yet
        config.write_text(config.read_text().replace("hub_strategy: checkpoint", "hub_strategy: best"))
        command("training.publish", run.folder, *to, "--hub_private_repo", hub=hub, cwd=tmp_path)
        repository = hub.repositories["models/user/done"]
        assert repository.messages == ["Step 20"] and repository.private and not repository.tags
        command("training.publish", run.folder, *to, hub=hub, cwd=tmp_path)
        assert repository.messages == ["Step 20"]  # nothing has changed
        tagged = [*to, "--hub_revisions", "--step", "5"]
        (run.folder / "hub").mkdir(exist_ok=True)
        queue_entry(run.checkpoints[2]).touch()
        command("training.publish", run.folder, *tagged, hub=hub, cwd=tmp_path)
        assert repository.messages[1:] == ["Step 5"] and [step_of(left) for left in pending(run.folder)] == [15]
        first = repository.tags["step_00000005"]
        command("training.publish", other.folder, *tagged, hub=hub, cwd=tmp_path)
        assert repository.tags["step_00000005"] not in (first, None)
        weights = repository.commits[repository.tags["step_00000005"]]["model.safetensors"]
        assert weights == (other.checkpoints[0] / "model.safetensors").read_bytes()
        checking = [run.folder, "--check", "--hub_model_id", "someone/else"]
        output = command("training.publish", *checking, hub=hub, cwd=tmp_path, exit_code=2)
        assert "the token is that of user, who may write to user" in output


@pytest.mark.parametrize(("every", "expected"), [(True, [5, 10, 15]), (False, [15])])
def test_what_waits_for_its_upload_is_not_pruned(every, expected, tmp_path):
    """Step 20 could not be written; files of others in the folder are left alone."""
    places = [tmp_path / "checkpoints" / f"step_{step:08d}" for step in (5, 10, 15, 20, 25)]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "thesis.tex").touch()
    uploads = Uploads(tmp_path, lambda: None, every=every)
    for place in places[:4]:
        uploads.enqueue(place)
        place.mkdir(parents=True)
        (place / "COMPLETE").touch()
    (places[3] / "COMPLETE").unlink()
    places[4].mkdir()
    (places[4] / "COMPLETE").touch()
    prune_checkpoints(tmp_path / "checkpoints", 1, 0, None, pending(tmp_path))
    assert [step_of(left) for left in complete_checkpoints(tmp_path / "checkpoints")] == [*expected, 25]
    uploads.close()
    assert (tmp_path / "hub" / "thesis.tex").exists()


@pytest.mark.slow
def test_the_best_checkpoint_is_the_released_one(recipe, tmp_path):
    """A run that learns its one batch by heart: main ends at the best step, not at the last."""
    flags = [
        "--push_to_hub",
        "--hub_model_id",
        "user/best",
        "--hub_strategy",
        "best",
        "--overfit_single_batch",
        "--max_steps",
        "80",
    ]
    with serve() as hub:
        run = begin(recipe("best", *flags, "--save_steps", "20"), tmp_path, online, hub.environment()).finished("best")
        losses = {step: line["val_loss"] for step, line in run.metrics().items() if step in (20, 40, 60, 80)}
        best = min(losses, key=losses.get)
        assert best < 80
        assert hub.repositories["models/user/best"].messages[-1] == f"Step {best}"
        command("training.publish", run.folder, hub=hub, cwd=tmp_path)
        assert hub.repositories["models/user/best"].messages[-1] == f"Step {best}"


def test_preflight_asks_the_hub(recipe, tmp_path):
    with serve() as hub:
        argv = recipe("asked", "--preflight", "--push_to_hub", "--hub_model_id", "user/asked")
        code, text = begin(argv, tmp_path, online, hub.environment()).ended()
        assert code == 0 and "a checkpoint written and read, access to user/asked" in text
        assert not hub.repositories
        hub.role = None  # a token of OAuth has none
        assert begin(argv, tmp_path, online, hub.environment()).ended()[0] == 0
        hub.role = "read"
        code, text = begin(argv, tmp_path, online, hub.environment()).ended()
        assert code == 2 and "user/asked: the token may only read" in text
    assert {path.name for path in tmp_path.iterdir()} == {"output_0", "output_1", "output_2"}


def test_data_is_used_from_the_hub(data_folder, recipe, tmp_path):
    """Pushed and trained on by its name there: the losses are those of the folder itself."""
    name = "hf://datasets/user/small"
    with serve() as hub:
        output = command("data_prep.push", data_folder, "user/small", "--license", "mit", hub=hub, cwd=tmp_path)
        assert f"{name} stands for it" in output
        card = hub.repositories["datasets/user/small"].commits[output.split()[0].rpartition("/")[2]]["README.md"]
        assert b"license: mit" in card and b"training/train.py --data hf://datasets/user/small" in card
        environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path / "cache")}
        launch(*recipe("far"), "--max_steps", "5", "--data", f"{name}@main", cwd=tmp_path, env=environment)
        assert "is whole" in command("data_prep.verify", name, hub=hub, cwd=tmp_path)
        output = command("data_prep.verify", f"{name}er", hub=hub, cwd=tmp_path, exit_code=2)
        assert output == "error: user/smaller: not found on the Hub, or you lack access\n"
    far = Finished(tmp_path / "runs" / "far", "")
    near = begin([*recipe("near"), "--max_steps", "5"], tmp_path).finished("near")
    assert far.losses() == near.losses()
    assert far.metrics()[5]["data"].keys() == {f"{name}@main"}


def test_what_cannot_be_a_repository(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", "/nonexistent")
    assert "is not of the form USER/NAME" in repository_problem("hub_model_id", "name")
    assert "'a/b/c'" in repository_problem("hub_model_id", "a/b/c")
    assert "HF_HUB_OFFLINE=1; unset it" in repository_problem("hub_model_id", "a/b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "needs a token that may write" in repository_problem("hub_model_id", "a/b")


def test_publishing_needs_no_torch():
    """It runs beside training, where starting must be cheap."""
    program = (
        "import sys, training.publish, eval.reporting.card; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = set(run_command(sys.executable, "-c", program, cwd=Path.cwd()).stdout.split())
    assert "training" in loaded and not loaded & {"torch", "transformers", "accelerate", "matplotlib"}
