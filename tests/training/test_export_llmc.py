"""llm.c's checkpoints, read by a reader that follows its C code."""

import struct

import pytest
import torch
from safetensors.torch import load_file

from data_prep.common.command_line import UserError
from modeling import GPTModel
from training.export_llmc import main, write_llmc

# train_gpt2.c, ParameterTensors: each for all layers before the next.
C_FIELDS = ["wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b", "fcw", "fcb",
            "fcprojw", "fcprojb", "lnfw", "lnfb"]  # fmt: skip


def as_c_reads_it(content: bytes) -> dict[str, torch.Tensor]:
    """The fields of `gpt2_build_from_checkpoint`, by the sizes of `fill_in_parameter_sizes`."""
    magic, version, t, v, layers, _, c, vp = struct.unpack("<8i", content[:32])
    assert magic == 20240326 and version in (3, 5) and vp % 128 == 0 and vp >= v
    of_a_layer = [c, c, 3 * c * c, 3 * c, c * c, c, c, c, 4 * c * c, 4 * c, c * 4 * c, c]
    sizes = [vp * c, t * c, *(layers * size for size in of_a_layer), c, c]
    values = torch.frombuffer(bytearray(content[1024:]), dtype=torch.float32 if version == 3 else torch.bfloat16)
    return dict(zip(C_FIELDS, values.split(sizes), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llm_c_reads_the_weights_of_the_checkpoint(dtype, tiny_run, tmp_path, monkeypatch):
    checkpoint = tiny_run.checkpoints[-1]
    monkeypatch.setattr("sys.argv", ["export_llmc", str(checkpoint), str(tmp_path / "model.bin"), "--dtype", dtype])
    main()
    fields = as_c_reads_it((tmp_path / "model.bin").read_bytes())
    weights = load_file(checkpoint / "model.safetensors")
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    block = "transformer.h.1."
    assert torch.equal(fields["wte"].view(-1, 32)[:601], expected["transformer.wte.weight"])
    assert not fields["wte"].view(-1, 32)[601:].any()
    assert torch.equal(fields["wpe"].view(32, 32), expected["transformer.wpe.weight"])
    # [out, in], as its matmul_forward reads weights; GPT-2's own layout on disk is transposed.
    assert torch.equal(fields["qkvw"].view(2, 96, 32)[1], expected[f"{block}attn.c_attn.weight"].T)
    assert torch.equal(fields["fcprojw"].view(2, 32, 128)[1], expected[f"{block}mlp.c_proj.weight"].T)
    assert torch.equal(fields["ln2b"].view(2, 32)[1], expected[f"{block}ln_2.bias"])
    assert torch.equal(fields["lnfw"], expected["transformer.ln_f.weight"])


def test_what_is_refused(tiny_run, tmp_path):
    model = GPTModel.from_pretrained(tiny_run.checkpoints[-1])
    model.config.activation_function, model.config.scale_attn_by_inverse_layer_idx = "gelu", True
    with pytest.raises(
        UserError,
        match="another network than this one, which has activation_function=gelu, scale_attn_by_inverse_layer_idx=True",
    ):
        write_llmc(model, tmp_path / "other.bin")
    assert not list(tmp_path.iterdir())
