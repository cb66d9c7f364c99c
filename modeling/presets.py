"""Published sizes of GPT-2 and GPT-3, their parameters and FLOPs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from modeling.gpt import GPTConfig


@dataclass(frozen=True)
class Preset:
    """A published size with its batch size and learning rate; the vocabulary is GPT-2's."""

    n_layer: int
    n_embd: int
    n_head: int
    n_positions: int
    batch_tokens: int
    learning_rate: float
    vocab_size: ClassVar[int] = 50257
    n_inner: ClassVar[int | None] = None
    tie_word_embeddings: ClassVar[bool] = True


# GPT-3: Brown et al. 2020, table 2.1, with batches rounded to multiples of powers of two, and for 1.3B 16 heads, as its
# 24 do not divide its width. GPT-2's paper has neither batch nor learning rate: those of the nearest GPT-3 size.
PRESETS = {
    "gpt2-124m": Preset(12, 768, 12, 1024, 2**19, 6.0e-4),
    "gpt2-350m": Preset(24, 1024, 16, 1024, 2**19, 3.0e-4),
    "gpt2-774m": Preset(36, 1280, 20, 1024, 2**19, 2.5e-4),
    "gpt2-1558m": Preset(48, 1600, 25, 1024, 2**20, 2.0e-4),
    "gpt3-125m": Preset(12, 768, 12, 2048, 2**19, 6.0e-4),
    "gpt3-350m": Preset(24, 1024, 16, 2048, 2**19, 3.0e-4),
    "gpt3-760m": Preset(24, 1536, 16, 2048, 2**19, 2.5e-4),
    "gpt3-1.3b": Preset(24, 2048, 16, 2048, 2**20, 2.0e-4),
    "gpt3-2.7b": Preset(32, 2560, 32, 2048, 2**20, 1.6e-4),
    "gpt3-6.7b": Preset(32, 4096, 32, 2048, 2**21, 1.2e-4),
    "gpt3-13b": Preset(40, 5120, 40, 2048, 2**21, 1.0e-4),
    "gpt3-175b": Preset(96, 12288, 96, 2048, 3 * 2**20, 0.6e-4),
}


def parameter_count(config: "GPTConfig | Preset") -> int:
    """Returns the exact number of parameters; a head tied to the embedding counts once."""
    c, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    attention, mlp, norm = (c + 1) * 3 * c + (c + 1) * c, (c + 1) * inner + (inner + 1) * c, 2 * c
    tables = config.vocab_size * (1 if config.tie_word_embeddings else 2) + config.n_positions
    return tables * c + config.n_layer * (attention + mlp + 2 * norm) + norm


def flops_per_token(config: "GPTConfig | Preset", sequence_length: int) -> int:
    """Returns the floating-point operations of training on one token, forward and backward, without recomputation.

    6 for each weight of a matrix product, and 12 `n_layer` `n_embd` `sequence_length` for attention, counted as full
    rather than causal (PaLM, arXiv:2204.02311, appendix B).
    """
    c, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    weights = config.n_layer * (4 * c * c + 2 * c * inner) + config.vocab_size * c
    return 6 * weights + 12 * config.n_layer * c * sequence_length
