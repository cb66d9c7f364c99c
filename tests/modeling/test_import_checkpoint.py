"""Checkpoints of other trainers against stock transformers with the same weights."""

import subprocess
import sys

import pytest
import torch
from small_models import as_in_nanogpt
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modeling import GPTModel
from modeling.import_checkpoint import import_checkpoint, main, write_folder

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32}
TOKENS = torch.arange(1, 25).reshape(2, 12)

# build-nanogpt saves an object of a class of its script.
SAVING = """
import sys, torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int

weights = torch.load(sys.argv[1])
config = GPTConfig(block_size=16, vocab_size=128, n_layer=2, n_head=4, n_embd=32)
torch.save({"model": weights, "config": config, "step": 19072, "val_loss": 3.07}, sys.argv[2])
"""


def stock(activation: str, vocab_size: int = 128) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=16, activation_function=activation, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def as_they_write(model: GPT2LMHeadModel, prefix: str = "", biases: bool = True) -> dict[str, torch.Tensor]:
    """nanoGPT's and build-nanogpt's names and layout: linear layers, the head, and the mask as a buffer."""
    weights = as_in_nanogpt(model) | {"lm_head.weight": model.lm_head.weight.detach()}
    if not biases:
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".bias")}
    weights |= {f"transformer.h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16) for i in range(2)}
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_nanogpt(tmp_path, prefix, monkeypatch):
    """Compiled or not, distributed or not: the logits are those of stock GPT-2 with nanoGPT's exact GELU."""
    model = stock("gelu")
    settings = {"block_size": 16, "vocab_size": 128, "bias": True, "dropout": 0.1, **SIZES}
    content = {"model": as_they_write(model, prefix), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    torch.save({**content, "model_args": settings, "iter_num": 600, "config": {"dataset": "x"}}, tmp_path / "ckpt.pt")
    monkeypatch.setattr("sys.argv", ["import_checkpoint", str(tmp_path / "ckpt.pt"), str(tmp_path / "folder")])
    main()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert again.config.eos_token_id is None  # 50256 is none of its tokens
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_nanogpt_without_biases(tmp_path):
    model = stock("gelu")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
    settings = {"block_size": 16, "vocab_size": 128, "bias": False, **SIZES}
    torch.save({"model": as_they_write(model, biases=False), "model_args": settings}, tmp_path / "ckpt.pt")
    imported = import_checkpoint(tmp_path / "ckpt.pt")
    torch.testing.assert_close(imported(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-4)


def test_build_nanogpt(tmp_path, monkeypatch, capsys):
    """By the command, and with the padding of the vocabulary cut off."""
    model = stock("gelu_new")
    torch.save(as_they_write(model), tmp_path / "weights.pt")
    subprocess.run([sys.executable, "-c", SAVING, tmp_path / "weights.pt", tmp_path / "model_19072.pt"], check=True)
    words = ["import_checkpoint", str(tmp_path / "model_19072.pt"), str(tmp_path / "out"), "--vocab_size", "101"]
    monkeypatch.setattr("sys.argv", words)
    main()
    assert capsys.readouterr().out.endswith(" 101 tokens\n")
    logits = GPTModel.from_pretrained(tmp_path / "out").eval()(TOKENS).logits
    torch.testing.assert_close(logits, model(TOKENS).logits[..., :101], rtol=0, atol=1e-4)
    with pytest.raises(SystemExit, match=f"error: {tmp_path / 'out'} exists; choose another name"):
        main()


class Runs:
    """A pickle that runs code."""

    def __reduce__(self):
        return open, ("was_here", "w")


def test_what_is_refused(tmp_path, monkeypatch):
    """In one line each, without running code in the file."""
    monkeypatch.chdir(tmp_path)
    settings = {"block_size": 16, "vocab_size": 128, **SIZES}
    good = as_they_write(stock("gelu"))
    wide = {**good, "transformer.wpe.weight": torch.zeros(17, 32)}
    less = {name: tensor for name, tensor in good.items() if "ln_f.weight" not in name}
    untied = {**good, "lm_head.weight": torch.zeros(128, 32)}
    for content, problem in {
        "code": ({"model": good, "model_args": Runs()}, r"would run code to be read \(io.open\)"),
        "weights alone": (good, "no weights under 'model'"),
        "no sizes": ({"model": good}, "does not say how large"),
        "one size": ({"model": good, "model_args": {"n_layer": 2}}, "does not say its block_size, vocab_size, n_head"),
        "shape": ({"model": wide, "model_args": settings}, r"wpe.weight: .* torch.Size\(\[17, 32\]\)"),
        "less": ({"model": less, "model_args": settings}, r"Missing key.*transformer.ln_f.weight"),
        "more": (
            {"model": {**good, "extra.weight": torch.zeros(1)}, "model_args": settings},
            r"Unexpected key.*extra.weight",
        ),
        "untied": ({"model": untied, "model_args": settings}, "not tied"),
    }.values():
        torch.save(content, "ckpt.pt")
        with pytest.raises(ValueError, match=problem):
            import_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "was_here").exists()
    for text in (b"", b"not a checkpoint"):
        (tmp_path / "ckpt.pt").write_bytes(text)
        with pytest.raises(ValueError, match="not a checkpoint that torch can read"):
            import_checkpoint(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="exists"):
        write_folder(GPTModel._from_config(GPT2Config(**settings | {"n_positions": 16})), None, tmp_path)
