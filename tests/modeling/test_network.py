"""`GPTModel` against stock GPT-2: arithmetic, generation, format on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SMALL, as_ours, random_stock_model, tokens
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, GPT2LMHeadModel

from modeling import GPTConfig, GPTModel

VARIANTS = {
    "plain": {},
    "one_layer_wide": {"n_layer": 1, "n_embd": 96, "n_head": 6},
    "n_inner": {"n_inner": 50},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "unscaled": {"scale_attn_weights": False},
    "inverse_layer_scale": {"scale_attn_by_inverse_layer_idx": True},
    "relu": {"activation_function": "relu"},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_loss_and_gradients_are_those_of_stock(fields, attention, tmp_path):
    stock = random_stock_model(**fields)
    ours = as_ours(stock, tmp_path, attn_implementation=attention)
    ids = tokens(3, 40)
    theirs, mine = stock(ids, labels=ids), ours(ids, labels=ids)
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=5e-6, rtol=0)  # ten units in the last place
    theirs.loss.backward()
    mine.loss.backward()
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), atol=1e-6, rtol=1e-4)
    assert not gradients


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_saved_model_is_stock_gpt2(fields, tmp_path):
    ours = GPTModel(GPTConfig(**{**SMALL, **fields})).eval()
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0.0

    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(stock) is GPT2LMHeadModel
    torch.testing.assert_close(stock(tokens(2, 48)).logits, ours(tokens(2, 48)).logits, atol=1e-5, rtol=0)

    stock.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_loads_the_layout_of_the_first_gpt2_release(tmp_path):
    """`openai-community/gpt2` was saved without the `transformer.` prefix and with causal masks as buffers."""
    stock = random_stock_model()
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    for layer in range(SMALL["n_layer"]):
        weights[f"h.{layer}.attn.bias"] = torch.ones(48, 48).tril().view(1, 1, 48, 48)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, report = GPTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = tokens(1, 20)
    torch.testing.assert_close(ours.eval()(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)


def test_inputs_embeds_token_types_and_outputs_are_those_of_stock(tmp_path):
    stock = random_stock_model()
    stock.set_attn_implementation("eager")
    ours = as_ours(stock, tmp_path, attn_implementation="eager")
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    types = tokens(2, 9)
    kwargs = {"inputs_embeds": embeds, "token_type_ids": types}
    theirs, mine = (
        model(**kwargs, output_hidden_states=True, output_attentions=True, use_cache=False) for model in (stock, ours)
    )
    assert len(mine.hidden_states) == SMALL["n_layer"] + 1 and len(mine.attentions) == SMALL["n_layer"]
    for kind in ("hidden_states", "attentions"):
        for left, right in zip(mine[kind], theirs[kind], strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_do_not_see_each_other(use_cache):
    """Positions that restart within a row separate what is packed into it, as elsewhere in transformers. Collators
    give their limits beside them, for kernels that need them."""
    torch.manual_seed(0)
    ours = GPTModel(GPTConfig(**SMALL)).eval()
    first, second = tokens(1, 7), tokens(1, SMALL["n_positions"], seed=2)  # together longer than the context
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": ids[0].tolist()} for ids in (first, second)])
    packed = ours(**batch, use_cache=use_cache).logits
    torch.testing.assert_close(packed[:, 7:], ours(second, use_cache=False).logits, atol=1e-5, rtol=0)


def test_dropout_is_honoured_where_set():
    ids = tokens(1, 16)
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        model = GPTModel(GPTConfig(**SMALL, **{field: 0.5})).train()
        losses = {model(ids, labels=ids).loss.item() for _ in range(3)}
        assert len(losses) == 3, field
        model.eval()
        assert model(ids, labels=ids).loss.item() == model(ids, labels=ids).loss.item()


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=1000, n_positions=256, n_embd=256, n_layer=8, n_head=4))
    residual = 0.02 / (2 * 8) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = residual if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < expected / 20, name
        else:
            expected = torch.ones_like(parameter) if "ln" in name and "weight" in name else torch.zeros_like(parameter)
            assert torch.equal(parameter, expected), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 30}, "n_embd=30 is not a multiple of n_head=4"),
        ({"n_head": 0}, "n_head=0 must be a whole number of at least 1"),
        ({"n_layer": -1}, "n_layer=-1 must be a whole number of at least 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be a whole number of at least 1"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **fields})


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(ValueError, match="model_type='llama'"):
        GPTModel.from_pretrained(tmp_path)


def test_an_input_longer_than_the_context_is_refused():
    model = GPTModel(GPTConfig(**SMALL))
    with pytest.raises(ValueError, match="49 tokens exceed n_positions=48"):
        model(tokens(1, 49))
