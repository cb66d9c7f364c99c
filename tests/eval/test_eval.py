"""The commands of eval on a checkpoint, against stock transformers."""

import importlib
import math
import shutil
import sys

import pytest
import torch
from conftest import run_command
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.cli import UserError, run
from eval.generate import generate
from eval.loss import read_tokens
from eval.models import load_model
from eval.plot import plot_losses, read_log


@pytest.fixture(scope="module")
def checkpoint(tiny_run):
    return tiny_run.checkpoints[-1]


def test_loss_of_a_text_file(checkpoint, text_files, tmp_path):
    """Loss, perplexity and bits per byte of a whole file, against stock GPT-2 window by window."""
    file = text_files / "json_decoder.txt"
    done = run_command(sys.executable, "-m", "eval.loss", checkpoint, "--data", file, cwd=tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(file.read_text(), verbose=False)["input_ids"]])
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            nats += F.cross_entropy(model(window[None, :-1]).logits[0].double(), window[1:], reduction="sum").item()
    loss, size = nats / (len(ids) - 1), len(file.read_bytes())
    expected = f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, {nats / math.log(2) / size:.4f} bits"
    assert done.stdout.startswith(expected), done.stdout
    assert f"({len(ids) - 1:,} tokens, windows of 32)" in done.stdout


def test_loss_of_a_data_folder_covers_its_whole_validation_split(checkpoint, data_folder, tmp_path):
    done = run_command(sys.executable, "-m", "eval.loss", checkpoint, "--data", data_folder, cwd=tmp_path)
    assert "(20,010 tokens, windows of 32)" in done.stdout


def test_generated_text_is_that_of_stock(checkpoint, tmp_path):
    command = [sys.executable, "-m", "eval.generate", checkpoint, "--prompt", "def ", "--max_new_tokens", "20"]
    done = run_command(*command, "--temperature", "0", cwd=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("def ")["input_ids"]]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert done.stdout.strip() == tokenizer.decode(output[0], skip_special_tokens=True).strip()


def test_samples_depend_on_their_seed_alone(checkpoint):
    model, tokenizer = load_model(str(checkpoint))
    model.train()
    options = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 0}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = generate(model, tokenizer, "import ", seed=1, **options)
    assert torch.equal(torch.rand(3), expected), "training's random numbers were drawn from"
    assert model.training
    assert first == generate(model, tokenizer, "import ", seed=1, **options)
    assert first != generate(model, tokenizer, "import ", seed=2, **options)


def test_a_prompt_longer_than_the_context_is_cut_from_its_left(checkpoint):
    model, tokenizer = load_model(str(checkpoint))
    options = {"max_new_tokens": 8, "seed": 0, "temperature": 0}
    long, short = "x = 1\n" * 100 + "def f", "x = 1\n" * 90 + "def f"
    assert generate(model, tokenizer, long, **options) == generate(model, tokenizer, short, **options) != ""


def test_a_short_prompt_is_kept_whole_however_much_is_asked_for(checkpoint):
    """The continuation is what gives way to the context of 32 tokens."""
    model, tokenizer = load_model(str(checkpoint))
    options = {"seed": 0, "temperature": 0}
    some = generate(model, tokenizer, "def f", max_new_tokens=10, **options)
    many = generate(model, tokenizer, "def f", max_new_tokens=200, **options)
    assert many.startswith(some) and len(tokenizer("def f" + many)["input_ids"]) <= 31


def test_a_truncated_model_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="copy'"):
        load_model(str(folder))


def test_another_tokenizer_is_refused(checkpoint, text_files, tmp_path):
    from data_prep.prepare import Recipe, prepare
    from data_prep.sources import Source

    other = tmp_path / "other"
    prepare(Recipe(Source(str(text_files)), tokenizer="bpe", vocab_size=400, shard_tokens=20_011), other)
    with pytest.raises(UserError, match=r"other was written with another tokenizer \(bpe-400\)"):
        read_tokens(other, AutoTokenizer.from_pretrained(checkpoint))


def test_log_lines_are_read_and_plotted(tmp_path):
    """Those of build-nanogpt too."""
    (tmp_path / "log.txt").write_text("0 val 10.9\n0 hella 0.25\n0 train 10.95\n1 train 10.5\n")
    curves = read_log(tmp_path / "log.txt")
    assert curves == {"val": ([0], [10.9]), "hella": ([0], [0.25]), "train": ([0, 1], [10.95, 10.5])}
    assert plot_losses(tmp_path).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "log.txt").write_text("what is this\nand this\n")
    with pytest.raises(UserError, match="not a log"):
        read_log(tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.loss", "no/such/model", "--data", "x.txt"], "error: model 'no/such/model'"),
        (["eval.loss", "CHECKPOINT", "--data", "x.txt"], "error: x.txt: not a readable text file"),
        (["eval.loss", "CHECKPOINT", "--data", "x", "--length", "33"], "error: length=33: a window has between 1 and"),
        (["eval.loss", "CHECKPOINT", "--data", "x", "--length", "0"], "error: length=0: a window has between 1 and"),
        (["eval.loss", "CHECKPOINT", "--data", "x", "--batch_size", "-1"], "error: batch_size=-1 must be at least 1"),
        (["eval.generate", "CHECKPOINT", "--promt", "x"], "unknown '--promt'; did you mean '--prompt'?"),
        (["eval.generate", "CHECKPOINT", "--temperature", "-1"], "error: temperature and top_k must be at least 0"),
        (["eval.plot", "no/such/run"], "error: no/such/run/log.txt: not a log"),
    ],
)
def test_bad_input_gets_one_line(checkpoint, tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(checkpoint) if word == "CHECKPOINT" else word for word in words])
    with pytest.raises(SystemExit) as ended:
        run(importlib.import_module(words[0]).main)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
