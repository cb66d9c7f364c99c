"""Accuracy of choosing the most likely ending, as an `evaluate` metric.

    metric = evaluate.load("eval/metrics/multiple_choice")
    metric.add_batch(nats=[[...], ...], lengths=[[...], ...], references=[...])
    metric.compute()

On several processes, pass `num_process`, `process_id` and a common `experiment_id` to `load`.
"""

import datasets
import evaluate

from eval.common.multiple_choice import accuracy


class MultipleChoice(evaluate.Metric):
    """`acc` by the summed cross entropy of each ending, `acc_norm` by that divided by its length."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"nats": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        kinds["lengths"] = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="acc by the summed cross entropy of each ending, acc_norm by that divided by its length.",
            citation="",
            inputs_description="Of each question: nats and lengths (in any unit) of its endings, and the right one.",
            features=datasets.Features(kinds),
        )

    def _compute(self, nats: list[list[float]], lengths: list[list[int]], references: list[int]) -> dict[str, float]:
        return {"acc": accuracy(nats, references, None), "acc_norm": accuracy(nats, references, lengths)}
