"""The sizes that GPT-2 and GPT-3 were published in, and what they cost."""

from dataclasses import dataclass

from modeling.configuration import GPTConfig


@dataclass(frozen=True)
class Preset:
    """A published size with the batch and learning rate to train it by."""

    n_layer: int
    n_embd: int
    n_head: int
    n_positions: int
    batch_tokens: int
    learning_rate: float


# GPT-3: Brown et al. 2020, table 2.1, whose 1.3B row prints 24 heads of 128, which is not its width of 2048: 16 here.
# Batch sizes are rounded there; here they are multiples of a power of two nearby. GPT-2's paper gives neither batch nor
# learning rate, so each GPT-2 size takes those of the GPT-3 size next to it.
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


def parameter_count(config: GPTConfig) -> int:
    """The exact number of parameters; a head tied to the embedding is counted once."""
    c, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    attention = (c + 1) * 3 * c + (c + 1) * c
    mlp = (c + 1) * inner + (inner + 1) * c
    norms = 2 * 2 * c
    head = 0 if config.tie_word_embeddings else config.vocab_size * c
    embeddings = (config.vocab_size + config.n_positions) * c
    return embeddings + config.n_layer * (attention + mlp + norms) + 2 * c + head


def flops_per_token(config: GPTConfig, sequence_length: int) -> int:
    """Floating-point operations to train on one token, forward and backward.

    6 for each weight of a matrix product, and 12 `n_layer` `n_embd` `sequence_length` for attention, taken as full
    rather than causal (PaLM, arXiv:2204.02311, appendix B). Recomputation does not count: this is the model's work.
    """
    c, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    weights = config.n_layer * (4 * c * c + 2 * c * inner) + config.vocab_size * c
    return 6 * weights + 12 * config.n_layer * c * sequence_length
