"""Arguments of `generate`, and the text-generation pipeline: what stock GPT-2 does with them."""

import warnings

import pytest
import torch
from small_models import as_ours, random_stock_model, tokens
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PreTrainedTokenizerFast,
    pipeline,
)

# Arguments of `generate` that change how the model is called, what it returns or whether it is refused; the others
# change what is done with its logits, which are those of stock.
GENERATE = {
    "do_sample": True,
    "num_beams": 3,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {},
    "max_cache_len": 30,
    "guidance_scale": 1.5,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 2,
    "disable_compile": True,
    "low_memory": True,
    "prefill_chunk_size": 4,
    "inputs": None,
    "synced_gpus": False,
    "assistant_model": "itself",
    "streamer": "streamer",
    "negative_prompt_ids": tokens(2, 9, seed=4),
    "negative_prompt_attention_mask": torch.ones(2, 9, dtype=torch.long),
    "custom_generate": lambda model, input_ids, own=None, **kwargs: input_ids + len(own or []),
    "output_router_logits": True,
    "max_new_tokns": 3,
}
WITH = {  # what an argument needs beside it, or takes effect with
    "num_return_sequences": {"do_sample": True},
    **{name: {"return_dict_in_generate": True} for name in GENERATE if name.startswith("output_")},
    "negative_prompt_ids": {"guidance_scale": 1.5},
    "negative_prompt_attention_mask": {"guidance_scale": 1.5, "negative_prompt_ids": GENERATE["negative_prompt_ids"]},
    "assistant_model": {"do_sample": False},
}


def _letters(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet())[:size])}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="!", pad_token="!")


ALONE = ("streamer", "assistant_model", "prompt_lookup_num_tokens")  # with a single prompt


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
    mask = torch.ones_like(prompt)
    mask[1:, :4] = 0  # on its left
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = model.generate(**{"input_ids": prompt, "attention_mask": mask, "max_new_tokens": 6} | given)
        except Exception as error:
            return type(error), str(error).replace(type(model).__name__, "MODEL")
    deprecated = {str(warning.message) for warning in caught if warning.category is FutureWarning}
    outputs = sorted(out) if isinstance(out, dict) else []
    return getattr(out, "sequences", out).tolist(), outputs, streamer.got, deprecated


@pytest.fixture
def models(tmp_path):
    """Of each test: some arguments leave their mark on a model."""
    stock = random_stock_model()
    return stock, as_ours(stock, tmp_path)


@pytest.mark.parametrize("argument", GENERATE)
def test_an_argument_does_what_it_does_for_stock(argument, models):
    stock, ours = models
    tokenizer = _letters(stock.config.vocab_size)
    found = _generated(ours, tokenizer, argument)
    assert found == _generated(stock, tokenizer, argument)
    assert isinstance(found[0], type) == (argument == "max_new_tokns"), "an error of both is no result"


@pytest.mark.parametrize("options", [{"stop_sequence": "d"}, {"do_sample": False, "num_beams": 2}], ids=str)
def test_the_pipeline_writes_what_it_writes_with_stock(options, tmp_path):
    texts, stock = [], random_stock_model()
    for model in (stock, as_ours(stock, tmp_path)):
        torch.manual_seed(3)
        generate = pipeline("text-generation", model=model, tokenizer=_letters(model.config.vocab_size), device="cpu")
        texts.append(generate("abc", max_new_tokens=12, **options))
    assert texts[0] == texts[1]
