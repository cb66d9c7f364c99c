"""Arguments of `forward`: both names of the cache, and the refusal of unknown ones."""

import re
import warnings

import pytest
import torch
from generation import KINDS, LENGTHS, SAMPLING, three_ways
from small_models import SMALL, as_ours, random_stock_model, tokens
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from modeling import GPTConfig, GPTModel


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**SMALL)).eval()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("sample", SAMPLING)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_that_of_stock_and_of_a_loop_without_cache(kind, sample, lengths, tmp_path):
    stock = random_stock_model()
    first, second, third = three_ways(stock, as_ours(stock, tmp_path), kind, sample, lengths)
    assert torch.equal(first, second) and torch.equal(second, third)


def test_continuous_batching_gives_the_tokens_of_stock(tmp_path):
    stock = random_stock_model()
    found = []
    for model in (stock, as_ours(stock, tmp_path)):
        config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
        prompts = [tokens(7).tolist(), tokens(3, seed=2).tolist()]
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # its default takes most of the memory
        results = model.generate_batch(prompts, config, continuous_batching_config=small)
        found.append(sorted(result.generated_tokens for result in results.values()))
    assert found[0] == found[1] and all(len(text) == 8 for text in found[0])


def test_both_names_of_the_cache_mean_the_same(model):
    ids, caches = tokens(2, 9), {name: DynamicCache(config=model.config) for name in ("cache", "past_key_values")}
    logits = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name, cache in caches.items():
            model(ids[:, :5], **{name: cache})
            logits.append(model(ids[:, 5:], **{name: cache}).logits)
        logits.append(model(ids[:, 5:], model(ids[:, :5]).cache).logits)
        with pytest.raises(ValueError, match="past_key_values"):
            model(ids, **caches)
    expected = model(ids, use_cache=False).logits[:, 5:]
    for found in logits:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["kv_cache", "caches", "cache_params", "past", "state"])
def test_a_cache_under_a_name_of_the_future_is_an_error_and_never_text(model, name, monkeypatch):
    """A generation loop of a later transformers, which has renamed the cache again."""
    prepare = model.prepare_inputs_for_generation

    def renamed(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        inputs[name] = inputs.pop("cache")
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", renamed)
    with pytest.raises(TypeError, match=rf"GPTModel.forward\(\) does not act on '{name}'"):
        model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False)
    with pytest.raises(TypeError, match=f"does not act on '{name}'"):
        model.transformer(tokens(1, 5), **{name: DynamicCache(config=model.config)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lables": None}, "does not act on 'lables'; did you mean 'labels'"),
        ({"attention_masks": None}, "did you mean 'attention_mask'"),
        ({"past_key_value": None}, "does not act on 'past_key_value'"),
        ({"encoder_hidden_states": None}, "does not act on 'encoder_hidden_states'"),
        ({"head_mask": None}, "does not act on 'head_mask'"),
        ({"cache_position": None}, "does not act on 'cache_position'"),
        ({"zzz": 1}, "does not act on 'zzz'; it knows attention_mask, cache"),
        ({"cu_seq_lens_q": None}, "'cu_seq_lens_q', which the attention kernel in use ('sdpa') does not act on"),
        ({"kernel_options": {}}, "'kernel_options', which the attention kernel in use"),
        ({"read_index": []}, "'read_index', which the attention kernel in use"),
        ({"cache": ()}, "cache must be a transformers Cache, this is tuple"),
        ({"cache": "dynamic"}, "cache must be a transformers Cache, this is str"),
    ],
)
def test_what_nothing_acts_on_is_refused(model, arguments, message):
    for part in (model, model.transformer):
        if part is model.transformer and "lables" in arguments:
            message = "GPTBackbone.forward() does not act on 'lables'"
        with pytest.raises(TypeError, match=re.escape(message)):
            part(tokens(1, 4), **arguments)


def test_a_cache_does_not_go_with_gradient_checkpointing(model):
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cache= does not work with gradient checkpointing"):
        model(tokens(1, 4), cache=DynamicCache(config=model.config))
    assert model(tokens(1, 4), labels=tokens(1, 4)).loss.requires_grad


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_is_causal_reaches_mask_and_kernel(attention, tmp_path):
    """transformers' decorator takes it from the configuration or the call: every token then sees all others."""
    stock = random_stock_model()
    ours = as_ours(stock, tmp_path, attn_implementation=attention)
    stock.set_attn_implementation(attention)
    ids = tokens(2, 9)
    theirs, mine = (model(ids, is_causal=False, use_cache=False).logits for model in (stock, ours))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(mine, ours(ids, use_cache=False).logits, atol=1e-3)
