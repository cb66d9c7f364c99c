"""Accuracy on HellaSwag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.hellaswag import HellaSwag, read_items
from training.loop.run import Run
from training.settings.schema import EvaluationSettings


@dataclass
class HellaSwagEvaluation:
    """Accuracy under the rule `completion`."""

    every: int
    task: HellaSwag
    at_start: bool = True
    at_checkpoints: bool = False

    @classmethod
    def prepare(cls, settings: EvaluationSettings, tokenizer: Any) -> list["HellaSwagEvaluation"]:
        """One evaluation, by the rule of GPT-2's and GPT-3's published numbers; none if the run does not ask for it."""
        if not settings.hellaswag_every:
            return []
        file = None if settings.hellaswag_data is None else Path(settings.hellaswag_data)
        items = read_items(file)[: settings.hellaswag_limit]
        return [cls(settings.hellaswag_every, HellaSwag.prepare(items, "completion", tokenizer))]

    def run(self, run: Run) -> dict[str, Any]:
        """`acc` and `acc_norm`. Collective: the ranks share the items."""
        result = self.task.evaluate(run.accelerator, run.bare_model, before_batch=run.check_stop)
        run.log.print(f"step {run.state.step:>6}  HellaSwag ({result.rule}) {result}")
        return result.metrics()
