"""What a summed cross entropy says of a text."""

import math


def language_modeling_scores(nats: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """What a summed cross entropy says of a text.

    Args:
        nats: the summed cross entropy, in nats.
        tokens, text_bytes: that it was summed over.

    Returns:
        `loss` in nats per token and `perplexity`, comparable for one tokenizer; `bits_per_byte`, comparable between
        tokenizers; NaN where there is nothing to divide by.
    """
    loss = nats / tokens if tokens else math.nan
    perplexity = math.inf if loss >= 700 else math.exp(loss)
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte(nats, text_bytes)}


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Cross entropy for each byte of text: comparable between tokenizers, as nats per token are not."""
    return nats / math.log(2) / text_bytes if text_bytes else math.nan
