"""Stock GPT-2 and `GPTModel` with the same random weights, small enough to compare in a moment."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from modeling import GPTModel

SMALL = {"vocab_size": 211, "n_positions": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 0}
SMALL |= {"eos_token_id": 210, "pad_token_id": 0}


def random_stock_model(seed=0, **fields) -> GPT2LMHeadModel:
    """Stock GPT-2 with every weight random, biases and norms too: a wrong one must show."""
    config = GPT2Config(**{**SMALL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **fields})
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def as_ours(stock: GPT2LMHeadModel, folder, **options) -> GPTModel:
    stock.save_pretrained(folder)
    return GPTModel.from_pretrained(folder, **options).eval()


def tokens(*shape, seed=1) -> torch.Tensor:
    return torch.randint(1, SMALL["vocab_size"] - 1, shape, generator=torch.Generator().manual_seed(seed))


def as_in_nanogpt(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model by name, the matrices of its blocks in `nn.Linear`'s layout."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: w.T.contiguous() if ".h." in name and w.dim() == 2 else w for name, w in weights.items()}
