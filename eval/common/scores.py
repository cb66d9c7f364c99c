"""Scores of a summed cross entropy."""

import math


def language_modeling_scores(nats: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """Returns `loss` in nats per token, `perplexity` and `bits_per_byte` of a summed cross entropy in `nats`.

    Only bits per byte compare between tokenizers. A score is NaN if its number of tokens or bytes is 0.
    """
    loss = nats / tokens if tokens else math.nan
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits_per_byte(nats, text_bytes)}


def perplexity(loss: float) -> float:
    """Returns the perplexity per token of a loss in nats per token."""
    return math.inf if loss >= 700 else math.exp(loss)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Returns the cross entropy in bits per byte of text; NaN for 0 bytes."""
    return nats / math.log(2) / text_bytes if text_bytes else math.nan
