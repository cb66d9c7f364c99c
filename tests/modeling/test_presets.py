"""The published sizes: parameter counts and FLOPs against the models themselves and the papers."""

import pytest
import torch

from modeling import PRESETS, GPTConfig, GPTModel, flops_per_token, parameter_count


def config_of(name: str, **fields) -> GPTConfig:
    preset = PRESETS[name]
    sizes = {field: getattr(preset, field) for field in ("n_layer", "n_embd", "n_head", "n_positions")}
    return GPTConfig(**sizes, **fields)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_that_of_the_model(name, tied):
    config = config_of(name, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = GPTModel(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)


def test_published_parameter_counts():
    # What the weights on the Hub count, GPT-2 from 124M to 1.5B.
    published = {"gpt2-124m": 124_439_808, "gpt2-350m": 354_823_168, "gpt2-774m": 774_030_080}
    published["gpt2-1558m"] = 1_557_611_200
    assert {name: parameter_count(config_of(name)) for name in published} == published
    # GPT-3's table 2.1 rounds, to the figure in the name.
    for name in PRESETS:
        family, size = name.split("-")
        if family == "gpt3":
            millions = float(size[:-1]) * (1000 if size.endswith("b") else 1)
            assert parameter_count(config_of(name)) / 1e6 == pytest.approx(millions, rel=0.04), name


def test_flops_are_what_torch_counts():
    """torch counts the products of a real forward and backward pass, attention as two of them."""
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    config._attn_implementation = "eager"
    model = GPTModel(config)
    ids = torch.randint(512, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, shift_labels=ids, use_cache=False).loss.backward()
    assert counter.get_total_flops() == flops_per_token(config, 64) * ids.numel()
