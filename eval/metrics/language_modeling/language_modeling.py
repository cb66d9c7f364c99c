"""Loss, perplexity and bits per byte as an `evaluate` metric.

    metric = evaluate.load("eval/metrics/language_modeling")
    metric.add_batch(nats=[...], tokens=[...], bytes=[...])
    metric.compute()

On several processes, pass `num_process`, `process_id` and a common `experiment_id` to `load`.
"""

import datasets
import evaluate

from eval.loss import language_modeling_scores


class LanguageModeling(evaluate.Metric):
    """Summed cross entropy per token and per byte."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"nats": "float64", "tokens": "int64", "bytes": "int64"}
        return evaluate.MetricInfo(
            description="Loss in nats per token, perplexity, and bits per byte, which compares between tokenizers.",
            citation="",
            inputs_description="Of each text or window: nats, its summed cross entropy; predicted tokens and bytes.",
            features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
        )

    def _compute(self, nats: list[float], tokens: list[int], bytes: list[int]) -> dict[str, float]:
        return language_modeling_scores(sum(nats), sum(tokens), sum(bytes))
