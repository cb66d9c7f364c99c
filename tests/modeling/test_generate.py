"""Every argument of `generate`, and the text-generation pipeline: what stock GPT-2 does with it."""

import inspect

import pytest
import torch
from small_models import as_ours, random_stock_model, tokens
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    pipeline,
)

# For each argument of `generate` and each field of `GenerationConfig` a value that has an effect or is refused.
GENERATE = {
    "max_length": 14,
    "max_new_tokens": 3,
    "min_length": 12,
    "min_new_tokens": 4,
    "early_stopping": True,
    "max_time": 1e-9,
    "stop_strings": list("abcdefghij"),
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {},
    "max_cache_len": 30,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.3,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "repetition_penalty": 2.0,
    "encoder_repetition_penalty": 2.0,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[7], [8, 9]],
    "renormalize_logits": True,
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 4,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": list(range(50)),
    "begin_suppress_tokens": [7],
    "sequence_bias": [[[7], 9.0]],
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 4.0},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": 7,
    "encoder_no_repeat_ngram_size": 2,
    "decoder_start_token_id": 3,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.5,
    "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 4,
    "target_lookbehind": 4,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "x",
    "compile_config": None,
    "disable_compile": True,
    "continuous_batching_config": None,
    "low_memory": True,
    "penalty_alpha": 0.5,
    "dola_layers": "low",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [],
    "force_words_ids": [[7]],
    "prefill_chunk_size": 4,
    "inputs": None,
    "generation_config": GenerationConfig(max_new_tokens=2),
    "logits_processor": LogitsProcessorList(),
    "stopping_criteria": StoppingCriteriaList(),
    "prefix_allowed_tokens_fn": lambda batch, ids: [7, 8, 9],
    "synced_gpus": False,
    "assistant_model": "itself",
    "streamer": "streamer",
    "negative_prompt_ids": tokens(2, 9, seed=4),
    "negative_prompt_attention_mask": torch.ones(2, 9, dtype=torch.long),
    "custom_generate": lambda model, input_ids, own=None, **kwargs: input_ids + len(own or []),
    "tokenizer": "tokenizer",
    "own": "abc",
    "output_router_logits": True,
    "max_new_tokns": 3,
}
WITH = {  # what an argument needs beside it, or takes effect with
    "stop_strings": {"tokenizer": "tokenizer"},
    "token_healing": {"tokenizer": "tokenizer"},
    "own": {"custom_generate": GENERATE["custom_generate"]},
    **{name: {"num_beams": 2} for name in ("early_stopping", "length_penalty")},
    **{name: {"do_sample": True} for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h")},
    **{name: {"do_sample": True} for name in ("epsilon_cutoff", "eta_cutoff")},
    "num_return_sequences": {"do_sample": True},
    "negative_prompt_ids": {"guidance_scale": 1.5},
    "negative_prompt_attention_mask": {"guidance_scale": 1.5, "negative_prompt_ids": GENERATE["negative_prompt_ids"]},
    "assistant_model": {"do_sample": False},
}


def _letters(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet())[:size])}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="!", pad_token="!")


ALONE = ("streamer", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # with a single prompt


class _Streamer:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.got.append(None)


def _generated(model, tokenizer, argument) -> object:
    """What `generate` returns with an argument, or the error that it raises, comparable between models."""
    streamer = _Streamer()
    special = {"itself": model, "streamer": streamer, "tokenizer": tokenizer}
    given = {argument: GENERATE[argument], **WITH.get(argument, {})}
    given = {name: special.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    prompt = tokens(1 if argument in ALONE else 2, 9)
    lengths = {} if argument in ("max_length", "max_new_tokens", "generation_config") else {"max_new_tokens": 6}
    torch.manual_seed(3)
    try:
        out = model.generate(**{"input_ids": prompt} | lengths | given)
    except Exception as error:
        return type(error), str(error).replace(type(model).__name__, "MODEL")
    return getattr(out, "sequences", out).tolist(), streamer.got


@pytest.fixture
def models(tmp_path):  # new ones for each test, as an early exit leaves its mark on a model
    stock = random_stock_model()
    return stock, as_ours(stock, tmp_path)


def test_the_table_has_every_argument():
    declared = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    fields = GenerationConfig().to_dict().keys() - {"transformers_version", "_from_model_config"}
    assert not (declared | fields) - GENERATE.keys()


@pytest.mark.parametrize("argument", GENERATE)
def test_an_argument_does_what_it_does_for_stock(argument, models):
    stock, ours = models
    tokenizer = _letters(stock.config.vocab_size)
    assert _generated(ours, tokenizer, argument) == _generated(stock, tokenizer, argument)


@pytest.mark.parametrize("options", [{"stop_sequence": "d"}, {"do_sample": False, "num_beams": 2}], ids=str)
def test_the_pipeline_writes_what_it_writes_with_stock(options, tmp_path):
    texts, stock = [], random_stock_model()  # an early exit leaves its mark on the model
    for model in (stock, as_ours(stock, tmp_path)):
        torch.manual_seed(3)
        generate = pipeline("text-generation", model=model, tokenizer=_letters(model.config.vocab_size), device="cpu")
        texts.append(generate("abc", max_new_tokens=12, **options))
    assert texts[0] == texts[1]
