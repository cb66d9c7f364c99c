"""A conversation, and a small model to learn it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from modeling import GPTConfig, GPTModel

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does json.dumps do?"},
    {"role": "assistant", "content": "It makes a string of an object."},
    {"role": "user", "content": "And json.loads?"},
    {"role": "assistant", "content": "The reverse\n\n of it."},
]


def base_model(data_folder: Path, n_positions: int = 128) -> tuple[GPTModel, Any]:
    """A model with random weights and the tokenizer of the small data."""
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "tokenizer")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": n_positions}
    model = GPTModel(GPTConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)).eval()
    with torch.no_grad():
        for block in model.transformer.h:  # so that its choices depend on all of the text, not on the last token alone
            block.attn.c_proj.weight *= 200
            block.mlp.c_proj.weight *= 200
    return model, tokenizer
