"""Scores of a summed cross entropy, and the `evaluate` metrics that report them."""

import math
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError

_METRICS = Path(__file__).parents[1] / "metrics"


def language_modeling_scores(nats: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """Returns `loss` in nats per token, `perplexity` and `bits_per_byte` of a summed cross entropy in `nats`.

    Only bits per byte compare between tokenizers. A score is NaN if its number of tokens or bytes is 0.
    """
    loss = nats / tokens if tokens else math.nan
    perplexity = math.inf if loss >= 700 else math.exp(loss)
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte(nats, text_bytes)}


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Returns the cross entropy in bits per byte of text; NaN for 0 bytes."""
    return nats / math.log(2) / text_bytes if text_bytes else math.nan


def load_metric(name: str) -> Any:
    """Loads a metric of `eval/metrics` with `evaluate`. Raises `UserError` if evaluate or datasets is not installed."""
    try:
        import evaluate

        return evaluate.load(str(_METRICS / name), keep_in_memory=True)
    except ImportError as error:
        raise UserError(f"scores are reported with evaluate ({error}); pip install evaluate datasets") from error
