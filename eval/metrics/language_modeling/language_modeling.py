"""Loss, perplexity and bits per byte as an `evaluate` metric.

    metric = evaluate.load("eval/metrics/language_modeling")
    metric.add_batch(nats=[...], tokens=[...], bytes=[...])  # as often as there are batches
    metric.compute()

For several processes load it with `num_process`, `process_id` and a common `experiment_id`; the first one gets the
result, the others None.
"""

import datasets
import evaluate

from eval.common.scores import language_modeling_scores


class LanguageModeling(evaluate.Metric):
    """The summed cross entropy of texts, over their tokens and over their bytes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Loss in nats per token, perplexity, and bits per byte, which compares between tokenizers.",
            citation="",
            inputs_description="Of each text or window: nats, its summed cross entropy; tokens and bytes predicted.",
            features=datasets.Features(
                {
                    "nats": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "bytes": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nats: list[float], tokens: list[int], bytes: list[int]) -> dict[str, float]:
        return language_modeling_scores(sum(nats), sum(tokens), sum(bytes))
