"""Accuracy of choosing the likeliest ending, as an `evaluate` metric.

    metric = evaluate.load("eval/metrics/multiple_choice")
    metric.add_batch(nats=[[...], ...], lengths=[[...], ...], references=[...])  # as often as there are batches
    metric.compute()

For several processes load it with `num_process`, `process_id` and a common `experiment_id`; the first one gets the
result, the others None.
"""

import datasets
import evaluate

from eval.scoring.multiple_choice import accuracy


class MultipleChoice(evaluate.Metric):
    """`acc` chooses the ending of the lowest cross entropy, `acc_norm` of the lowest for its length."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="acc by the summed cross entropy of each ending, acc_norm by that divided by its length.",
            citation="",
            inputs_description="Of each question: nats and lengths (in any unit) of its endings, and the right one.",
            features=datasets.Features(
                {
                    "nats": datasets.Sequence(datasets.Value("float64")),
                    "lengths": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nats: list[list[float]], lengths: list[list[int]], references: list[int]) -> dict[str, float]:
        return {"acc": accuracy(nats, references, None), "acc_norm": accuracy(nats, references, lengths)}
