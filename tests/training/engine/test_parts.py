"""The pure parts of training against formulas written out."""

import pytest
import torch

from modeling import GPTConfig, GPTModel
from training.engine.optimizer import make_optimizer
from training.records.step_metrics import peak_flops
from training.settings.schema import OptimizerSettings


@pytest.mark.parametrize("tied", [True, False])
def test_decay_on_matrices_and_embeddings_only(tied):
    model = GPTModel(GPTConfig(vocab_size=50, n_positions=8, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=tied))
    settings = OptimizerSettings(optim="adamw", weight_decay=0.3)
    groups = make_optimizer(model, settings).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(named)
    for name, parameter in named.items():
        matrix = name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")) or (
            ".h." in name and parameter.dim() == 2
        )
        assert decay[id(parameter)] == (0.3 if matrix else 0.0), name
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["fused"] for group in groups)


def test_optimizer_step_is_adamw_of_the_paper():
    """Loshchilov and Hutter, algorithm 2, in float64."""
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    module = torch.nn.Module()
    module.weight = parameter
    optimizer = make_optimizer(module, OptimizerSettings(optim="adamw", learning_rate=0.1, weight_decay=0.2))
    x, m, v = parameter.detach().double().clone(), 0.0, 0.0
    for step, gradient in enumerate(([[0.5, 1.0]], [[-0.3, 0.2]], [[0.0, 4.0]]), start=1):
        g = torch.tensor(gradient)
        parameter.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g.double(), 0.95 * v + 0.05 * g.double() ** 2
        x = x - 0.1 * 0.2 * x - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), x, atol=1e-6, rtol=0)


def test_an_unknown_peak_is_none():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12 and peak_flops("NVIDIA L4", "bf16") == 121e12
    for unlisted in ("NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA T400", "NVIDIA GB200"):
        assert peak_flops(unlisted, "bf16") is None
    assert peak_flops("2 CPU threads", "bf16") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no") is None
