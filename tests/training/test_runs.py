"""Whole runs, each in processes of its own, against independent re-statements and against each other."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_MODEL, VOCAB_SIZE, Finished, launch, run_command
from forks import begin
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.common.command_line import UserError, run
from data_prep.inspect import sequences
from data_prep.prepare import Recipe, prepare
from data_prep.sources.source import Source
from modeling import GPTConfig, GPTModel
from training.checkpointing.store import RunState, complete_checkpoints, load_state, prune_checkpoints
from training.engine.data import load_data
from training.resume import resumed_state
from training.settings.reading import parse_config
from training.train import main, read_config


def initial_model(data_folder, folder):
    """The weights that a run with the default seed begins from, as a stock GPT-2."""
    torch.manual_seed(1337)
    eos = VOCAB_SIZE - 1
    sizes = {"vocab_size": VOCAB_SIZE, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPTModel(GPTConfig(**sizes, bos_token_id=eos, eos_token_id=eos)).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_losses_are_those_of_build_nanogpts_loop(tiny_run, data_folder, tmp_path):
    """The loop of "Let's reproduce GPT-2 (124M)", restated around stock GPT-2."""
    batch, length, accumulation, max_steps, warmup, max_lr = 8, 32, 2, 20, 3, 1e-2
    model = initial_model(data_folder, tmp_path).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=max_lr, betas=(0.9, 0.95), eps=1e-8)

    shards = sorted(path for path in data_folder.iterdir() if "train" in path.name)
    tokens, position = torch.tensor(np.load(shards[0]).astype(np.int32), dtype=torch.long), 0
    losses, norms = [], []
    for step in range(max_steps):
        optimizer.zero_grad()
        mean = 0.0
        for _ in range(accumulation):
            buffer = tokens[position : position + batch * length + 1]
            position += batch * length
            x, y = buffer[:-1].view(batch, length), buffer[1:].view(batch, length)
            loss = F.cross_entropy(model(x).logits.view(-1, VOCAB_SIZE), y.view(-1)) / accumulation
            mean += loss.item()
            loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        progress = (step - warmup) / (max_steps - warmup)
        cosine = max_lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = max_lr * (step + 1) / warmup if step < warmup else cosine
        optimizer.step()
        losses.append(mean)

    assert max(norms) > 1.0  # clipping took part
    assert losses[-1] < losses[0] - 0.5  # and it learned
    np.testing.assert_allclose(tiny_run.losses(), losses, atol=1e-4, rtol=0)
    metrics = tiny_run.metrics()
    np.testing.assert_allclose([metrics[step]["grad_norm"] for step in range(max_steps)], norms, rtol=1e-3)


def with_torchrun(processes: int, run: Finished, folder: Path, *flags: str) -> Finished:
    """A run with another's settings."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    words = [ROOT / "training" / "train.py", run.folder / "config.yaml", "--output_dir", "run", *flags]
    run_command(*launcher, *words, cwd=folder)
    assert json.loads((folder / "run" / "environment.json").read_text())["num_processes"] == processes
    return Finished(folder / "run", "")


@pytest.fixture(scope="module")
def two_processes(tiny_run, tmp_path_factory) -> Finished:
    return with_torchrun(2, tiny_run, tmp_path_factory.mktemp("two"), "--per_device_train_batch_size", "4")


@pytest.mark.processes
def test_two_processes_do_not_change_the_losses(tiny_run, two_processes):
    difference = np.array(two_processes.losses()) - np.array(tiny_run.losses())
    assert np.abs(difference).max() < 1e-4 and abs(difference.mean()) < 2e-5
    for step in (0, 5, 10, 15, 20):
        losses = [run.metrics()[step]["val_loss"] for run in (tiny_run, two_processes)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.processes
def test_torchrun_with_one_process_is_as_good_as_none(tiny_run, tmp_path):
    assert with_torchrun(1, tiny_run, tmp_path).losses() == tiny_run.losses()


@pytest.mark.processes
def test_compressed_gradients_are_rounded(two_processes, tmp_path):
    losses = with_torchrun(2, two_processes, tmp_path, "--gradient_compression", "fp16").losses()
    assert losses == pytest.approx(two_processes.losses(), abs=1e-2) and losses != two_processes.losses()


# Everything that a step's number or position decides: the batch, the learning rates, Muon's momentum, the order.
FLAGS = (
    "--order shuffled --per_device_train_batch_size 4 --max_steps 10 --eval_steps 5 --save_steps 5 "
    "--save_total_limit 9 --optim muon --muon_learning_rate 2e-2 --z_loss 1e-3 --gradient_checkpointing selective "
    "--lr_scheduler_type wsd --warmup_tokens 1000 --batch_tokens 1024 --batch_ramp_start 256 --batch_ramp_tokens 2048 "
    "--sample_every 10 --sample_tokens 8 --sample_prompts def def def"
)


@pytest.fixture(scope="session")
def recipe(train) -> Finished:
    return train("recipe", *FLAGS.split())


def test_a_ramp_of_batches_is_accounted_for(recipe):
    """Linear from 256 to 1,024 over 2,048 tokens, in multiples of 256; each token once, the learning rate by them."""
    metrics, consumed = recipe.metrics(), 0
    for step in range(10):
        batch = 1024 if consumed >= 2048 else 256 * (1 + int(3 * consumed / 2048))
        consumed += batch
        assert (metrics[step]["batch_tokens"], metrics[step]["tokens"]) == (batch, consumed)
        assert metrics[step]["learning_rate"] == pytest.approx(1e-2 * min(1, consumed / 1000))
        assert metrics[step]["z_loss"] > 0 and 0 <= metrics[step]["data_wait"] < 1
    assert [metrics[step]["batch_tokens"] for step in (0, 3, 9)] == [256, 512, 1024]
    assert load_state(recipe.checkpoints[-1]).position == consumed // 32


def test_samples_of_a_prompt_differ(recipe):
    samples = [json.loads(line) for line in (recipe.folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == ["def"] * 3
    assert len({sample["text"] for sample in samples}) == 3


def test_a_cooldown_branches_off_from_any_checkpoint(recipe):
    """Settings, weights and position are the trunk's; the learning rate falls to its end over what is added."""
    trunk = recipe.folder / "checkpoints" / "step_00000005"
    before = {path: path.read_bytes() for path in recipe.folder.rglob("*") if path.is_file()}
    words = ["--resume_from_checkpoint", trunk, "--cooldown_steps", "4", "--run_name", "cooled"]
    branch = begin(words, recipe.folder.parents[1]).finished("cooled")
    assert {path: path.read_bytes() for path in recipe.folder.rglob("*") if path.is_file()} == before
    metrics = branch.metrics()
    assert sorted(metrics) == [5, 6, 7, 8, 9] and "val_loss" in metrics[9]
    assert metrics[5]["loss"] == recipe.metrics()[5]["loss"]  # of the same weights, on the same batch
    start = [metrics[step]["tokens"] - metrics[step]["batch_tokens"] for step in range(5, 9)]
    length = metrics[8]["tokens"] - start[0]
    rates = [1e-2 * (0.1 + 0.9 * (1 - (tokens - start[0]) / length)) for tokens in start]
    assert [metrics[step]["learning_rate"] for step in range(5, 9)] == pytest.approx(rates)
    assert yaml.safe_load((branch.folder / "config.yaml").read_text())["max_steps"] == 9
    assert load_state(branch.checkpoints[-1]).best_step is None  # the checkpoint of step 5 is not one of this run


def test_a_run_begins_from_a_checkpoint(train, tiny_run):
    """With its sizes, unless told otherwise; as from the Hub, without a state of training."""
    last = tiny_run.checkpoints[-1]
    other = train("begun", "--model_name_or_path", last, "--max_steps", "3", "--per_device_train_batch_size", "auto")
    assert other.metrics()[0]["val_loss"] == pytest.approx(tiny_run.metrics()[20]["val_loss"], abs=1e-6)
    assert f"from {last}" in other.stdout
    assert f"1 accumulated x {512 // 32} sequences" in other.stdout  # all has room


def test_one_batch_is_learned_by_heart(train, tiny_run):
    flags = ["--max_steps", "20", "--per_device_train_batch_size", "8", "--eval_steps", "20"]
    run = train("overfit", "--overfit_single_batch", *flags)
    losses, of_text = run.losses(), tiny_run.losses()
    assert losses[0] == of_text[0] and losses[-1] < of_text[-1] - 0.5


def test_what_is_evaluated_does_not_change_the_losses(train, tiny_run, swag_file):
    evaluated = ["--eval_steps", "1", "--sample_every", "2", "--sample_tokens", "4", "--save_steps", "4"]
    evaluated += ["--hellaswag_every", "3", "--hellaswag_data", swag_file]
    busy = train("busy", "--max_steps", "20", "--per_device_train_batch_size", "8", *evaluated)
    assert busy.losses() == tiny_run.losses()
    scored = [step for step, line in busy.metrics().items() if "hellaswag/completion/acc" in line]
    assert scored == [*range(0, 20, 3), 20]
    samples = [json.loads(line) for line in (busy.folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [step for step in range(2, 21, 2) for _ in range(3)]


def test_validation_loss_is_what_stock_transformers_computes(tiny_run, data_folder):
    """On the saved checkpoint and the same tokens, with a vocabulary that is no multiple of 128."""
    assert VOCAB_SIZE % 128
    tokens = torch.tensor(np.load(next(data_folder.glob("*_val_*.npy"))).astype(np.int64))[: 4096 + 1]
    x, y = tokens[:-1].view(-1, 32), tokens[1:].view(-1, 32)
    for folder in tiny_run.checkpoints:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            loss = F.cross_entropy(model(x).logits.flatten(0, 1).double(), y.flatten()).item()
        reported = tiny_run.metrics()[load_state(folder).step]
        assert reported["val_loss"] == pytest.approx(loss, abs=1e-5)

        tokenizer = AutoTokenizer.from_pretrained(folder)
        text_bytes = sum(len(tokenizer.decode([i], skip_special_tokens=True).encode()) for i in y.flatten() if i < 256)
        others = [int(i) for i in y.flatten() if 256 <= i < VOCAB_SIZE - 1]
        text_bytes += sum(len(tokenizer.convert_ids_to_tokens(i)) for i in others)
        bits = loss * y.numel() / math.log(2) / text_bytes
        # Bytes that are no characters of their own decode to more than one byte; there are few in source text.
        assert reported["val_bits_per_byte"] == pytest.approx(bits, rel=0.01)


def test_a_checkpoint_is_an_ordinary_model_folder(tiny_run, data_folder):
    last = tiny_run.checkpoints[-1]
    names = {path.name for path in last.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "COMPLETE"} <= names
    tokenizer = AutoTokenizer.from_pretrained(last)
    model = AutoModelForCausalLM.from_pretrained(last)
    assert type(model).__module__.startswith("transformers.models.gpt2")
    assert model.config.vocab_size == len(tokenizer) == VOCAB_SIZE
    assert model.config.eos_token_id == tokenizer.eos_token_id == VOCAB_SIZE - 1
    assert load_state(last).position == 20 * 512 // 32
    hashes = json.loads((last / "COMPLETE").read_text())
    files = {str(path.relative_to(last)) for path in last.rglob("*") if path.is_file()}
    assert set(hashes) == files - {"COMPLETE"}


def test_sequences_of_a_run_are_shown_as_text(recipe, data_folder):
    config = parse_config([str(recipe.folder / "config.yaml")])
    batch = load_data(config).batches(config, "train").sequences(40, 3)
    shown = list(sequences([str(data_folder)], recipe.folder, 40, 43))
    assert [title for title, _ in shown] == ["sequence 40", "sequence 41", "sequence 42"]
    assert [ids.tolist() for _, ids in shown] == batch["input_ids"].tolist()


def test_what_a_run_writes(tiny_run):
    names = {path.name for path in tiny_run.folder.iterdir()}
    written = {"config.yaml", "environment.json", "log.txt", "metrics.jsonl", "samples.jsonl", "checkpoints", "report"}
    assert names == written | {"committed.json"}
    assert (tiny_run.folder / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = (tiny_run.folder / "log.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\d+ (train \d+\.\d{6}|val \d+\.\d{4})", line) for line in log)
    assert len(log) == 20 + 5
    step = tiny_run.metrics()[7]
    assert step["tokens"] == 8 * 512 and step["tokens_per_second"] > 0 and step["mfu"] is None
    assert 10**7 < step["memory_bytes"] < 10**11
    assert yaml.safe_load((tiny_run.folder / "config.yaml").read_text())["batch_tokens"] == 512
    assert json.loads((tiny_run.folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    for step in (10, 20, 30, 40, 50):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        if step != 50:  # which is somebody else's
            (folder / "COMPLETE").write_text("{}")
    for name in (".step_00000060.partial", ".step_00000005.removing"):  # of kills
        (tmp_path / name).mkdir()
    prune_checkpoints(tmp_path, save_total_limit=2, keep_every=0, best_step=10)
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"step_{step:08d}" for step in (10, 30, 40)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in (10, 30, 40, 50)]
    prune_checkpoints(tmp_path, save_total_limit=1, keep_every=20, best_step=50)  # which could not be written
    assert len(complete_checkpoints(tmp_path)) == 3
    prune_checkpoints(tmp_path, save_total_limit=1, keep_every=20, best_step=40)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000040"]


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tiny_run):
    metrics = tiny_run.metrics()
    best = min((5, 10, 15, 20), key=lambda step: metrics[step]["val_loss"])
    assert f"best checkpoint  runs/tiny/checkpoints/step_{best:08d}" in tiny_run.stdout
    assert {load_state(folder).step for folder in tiny_run.checkpoints} == {15, 20, best}


RESUME = "--run_name tiny --resume_from_checkpoint"
REFUSALS = [
    ("--run_name tiny", "runs/tiny holds a run already (its last checkpoint is step_00000020)"),
    ("--run_name none --resume_from_checkpoint", "runs/none has no complete checkpoint to resume from"),
    (RESUME, "is at step 20 of max_steps=20; to continue, raise it and give --override"),
    (f"{RESUME} --n_head 2", "is another model (n_head=4, not 2)"),
    (
        "--run_name branch --resume_from_checkpoint runs/tiny/checkpoints/step_00000020",
        "step_00000020 is at step 20 of max_steps=20; to continue, raise it\n",
    ),
    (f"{RESUME} --max_steps 30", "give another result (max_steps=20, now 30); "),
    (
        f"{RESUME} --max_steps 30 --seed 3 --override max_steps",
        "(seed=1337, now 3); resume with those in runs/tiny/config.yaml, or confirm the change: --override seed",
    ),
    (f"{RESUME} --override max_step", "override: unknown 'max_step'; did you mean 'max_s"),
    ("--run_name long --n_positions 30000 --batch_tokens 30000 --per_device_train_batch_size 1", "do not fill"),
    ("--run_name x --attn_implementation flesh", "cannot make the model: "),
    ("--run_name x --n_layerz 2", "unknown '--n_layerz'; did you mean '--n_layer'?"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSALS, ids=[message[:20] for _, message in REFUSALS])
def test_a_run_that_cannot_be_is_refused(tiny_run, data_folder, flags, message, monkeypatch, capsys):
    """In this process, for speed: one line, no traceback, and nothing made."""
    root = tiny_run.folder.parents[1]
    monkeypatch.chdir(root)
    words = "--order sequential --batch_tokens 512 --max_steps 20 --per_device_train_batch_size 8 --warmup_steps 3 "
    words += f"--mixed_precision no --learning_rate 1e-2 {flags}"
    monkeypatch.setattr("sys.argv", ["train.py", "--data", str(data_folder), *TINY_MODEL, *words.split()])
    before = sorted(root.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(read_config()))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert sorted(root.rglob("*")) == before


def test_another_tokenizer_is_refused_on_resume(tiny_run, data_folder, text_files, tmp_path, monkeypatch):
    prepare(Recipe(Source(str(text_files)), tokenizer="bpe", vocab_size=400, shard_tokens=20_011), tmp_path / "other")
    config = parse_config(["--data", str(tmp_path / "other"), "--max_steps", "30", *TINY_MODEL])
    identity = load_data(config).identity(config)
    with pytest.raises(UserError, match="trained on the data of another tokenizer"):
        resumed_state(config, tiny_run.checkpoints[-1], RunState(identity, config.result_affecting_settings("no"), 1))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="refused only where there is no accelerator")
def test_processes_on_gpus_that_are_not_there_are_refused(data_folder, tmp_path):
    """The environment that the launcher sets for ddp.yaml."""
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    launched["ACCELERATE_MIXED_PRECISION"] = "no"  # which torchrun does not set
    text = begin(["--data", data_folder, "--batch_tokens", "4096"], tmp_path, env=launched).ended_with(2)
    assert text.startswith("error: the launch asked for 2 processes on GPUs, and torch sees none; ")


DYNAMO = ("--dynamo_backend", "eager", "--dynamo_use_regional_compilation")
THREE = ("--num_processes", "3", "--gpu_ids=-1,-1,-1", "--mixed_precision", "no")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("launch_file", "options", "device"),
    [("cpu", ("--dynamo_backend", "eager"), "1 x"), ("cpu_ddp", (*DYNAMO, *THREE), "3 x")],
    ids=["dynamo", "dynamo of three processes"],
)
def test_a_launch_as_accelerate_config_describes_it(data_folder, tmp_path, launch_file, options, device):
    """Nothing is given but what the tiny model needs: batch, micro-batch and warmup adapt."""
    flags = ["--data", data_folder, *TINY_MODEL, "--max_steps", "3", "--val_tokens", "2048", "--sample_every", "0"]
    done = launch(*flags, "--run_name", "run", cwd=tmp_path, launch_file=launch_file, options=options)
    assert f"device  {device}" in done.stdout
    assert ("float32" in done.stdout) or "no" not in options
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "step_00000003"
    stock, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    validated = [line for line in done.stdout.splitlines() if "validation loss" in line and line.startswith("step ")]
    assert float(validated[-1].split()[4].rstrip(",")) < float(validated[0].split()[4].rstrip(",")) - 0.1
    optimized = {name.rpartition("/")[0] for name in load_file(checkpoint / "training_state" / "optimizer.safetensors")}
    assert optimized == {name for name, _ in stock.named_parameters()}


@pytest.mark.processes
@pytest.mark.skipif(torch.accelerator.is_available(), reason="refused only where there is no accelerator")
def test_a_launch_that_cannot_be_had_is_refused(data_folder, tmp_path):
    flags = ["--data", data_folder, "--n_positions", "32", "--batch_tokens", "1024"]
    options = ("--num_processes", "2", "--gpu_ids=-1,-1")
    done = launch(*flags, cwd=tmp_path, launch_file="fsdp2", options=options, exit_code=None)
    assert "error: the Accelerate config asks for FSDP, Accelerate gives" in done.stderr
    assert not list(tmp_path.iterdir())
