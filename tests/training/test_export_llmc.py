"""llm.c's checkpoints: there and back, and read by a reader that follows its C code."""

import struct

import pytest
import torch
from safetensors.torch import load_file

from data_prep.common.command_line import UserError
from modeling import GPTModel
from training.export_llmc import main, read_llmc, write_llmc

# train_gpt2.c, ParameterTensors: each for all layers before the next.
C_FIELDS = ["wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b", "fcw", "fcb",
            "fcprojw", "fcprojb", "lnfw", "lnfb"]  # fmt: skip


def as_c_reads_it(content: bytes) -> dict[str, torch.Tensor]:
    """The fields of `gpt2_build_from_checkpoint`, by the sizes of `fill_in_parameter_sizes`."""
    magic, version, t, v, layers, _, c, vp = struct.unpack("<8i", content[:32])
    assert (magic, version) == (20240326, 3) and vp % 128 == 0 and vp >= v
    of_a_layer = [c, c, 3 * c * c, 3 * c, c * c, c, c, c, 4 * c * c, 4 * c, c * 4 * c, c]
    sizes = [vp * c, t * c, *(layers * size for size in of_a_layer), c, c]
    values = torch.frombuffer(bytearray(content[1024:]), dtype=torch.float32)
    return dict(zip(C_FIELDS, values.split(sizes), strict=True))


def test_round_trip(tiny_run, tmp_path, monkeypatch):
    """By the command, in float32: bit-identical weights, in a folder that holds nothing else than the first one's."""
    checkpoint = tiny_run.checkpoints[-1]
    monkeypatch.chdir(tmp_path)
    for words in ([checkpoint, "model.bin"], ["model.bin", "back", "--tokenizer", checkpoint]):
        monkeypatch.setattr("sys.argv", ["export_llmc", *map(str, words)])
        main()
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        path.name for path in checkpoint.iterdir() if path.name not in ("COMPLETE", "training_state")
    }
    again = GPTModel.from_pretrained(tmp_path / "back").config
    assert again.eos_token_id == GPTModel.from_pretrained(checkpoint).config.eos_token_id

    fields = as_c_reads_it((tmp_path / "model.bin").read_bytes())
    block = "transformer.h.1."
    assert torch.equal(fields["wte"].view(-1, 32)[:601], before["transformer.wte.weight"])
    assert not fields["wte"].view(-1, 32)[601:].any()
    # [out, in], as its matmul_forward reads weights; GPT-2's own layout on disk is transposed.
    assert torch.equal(fields["qkvw"].view(2, 96, 32)[1], before[f"{block}attn.c_attn.weight"].T)
    assert torch.equal(fields["fcprojw"].view(2, 32, 128)[1], before[f"{block}mlp.c_proj.weight"].T)
    assert torch.equal(fields["ln2b"].view(2, 32)[1], before[f"{block}ln_2.bias"])
    assert torch.equal(fields["lnfw"], before["transformer.ln_f.weight"])


def test_bfloat16(tiny_run, tmp_path):
    model = GPTModel.from_pretrained(tiny_run.checkpoints[-1])
    write_llmc(model, tmp_path / "model.bin", torch.bfloat16)
    back = read_llmc(tmp_path / "model.bin").state_dict()
    assert all(torch.equal(back[name], tensor.bfloat16().float()) for name, tensor in model.state_dict().items())


def test_what_is_refused(tiny_run, tmp_path):
    model = GPTModel.from_pretrained(tiny_run.checkpoints[-1])
    file = tmp_path / "model.bin"
    write_llmc(model, file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"has 46,975 parameters, its header says 46,976"):
        read_llmc(file)
    file.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"not a checkpoint of llm\.c"):
        read_llmc(file)
    model.config.activation_function, model.config.scale_attn_by_inverse_layer_idx = "gelu", True
    with pytest.raises(
        UserError,
        match="another network than this one, which has activation_function=gelu, scale_attn_by_inverse_layer_idx=True",
    ):
        write_llmc(model, tmp_path / "other.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
