"""Scores on tasks of the lm-evaluation-harness."""

from dataclasses import dataclass
from typing import Any

import torch

from eval.common.generation import isolated_random_state
from eval.harness import evaluate_tasks, load_tasks
from training.loop.run import Run
from training.settings.config import TrainingConfig


@dataclass
class HarnessEvaluation:
    """The harness on some of its tasks, whose full results are kept beside the checkpoints.

    Attributes:
        task_manager: the harness's index of its tasks.
    """

    every: int
    tokenizer: Any
    task_manager: Any
    at_start: bool = False
    at_checkpoints: bool = False

    @classmethod
    def prepare(cls, config: TrainingConfig, tokenizer: Any) -> list["HarnessEvaluation"]:
        """The evaluation, with its tasks loaded; none if the run does not use the harness."""
        settings = config.evaluation
        if not settings.lm_eval_every:
            return []
        return [cls(settings.lm_eval_every, tokenizer, load_tasks(settings.lm_eval_tasks, config.model.n_positions))]

    def run(self, run: Run) -> dict[str, Any]:
        """The score of each task and metric. Collective."""
        settings, step = run.config.evaluation, run.state.step
        run.checkpoints.mkdir(exist_ok=True)
        device = run.accelerator.device
        with isolated_random_state(run.config.run.seed, device), torch.compiler.set_stance("force_eager"):
            scores = evaluate_tasks(
                run.accelerator,
                run.bare_model,
                self.tokenizer,
                settings.lm_eval_tasks,
                self.task_manager,
                output=run.checkpoints / f"step_{step:08d}.lm_eval.json",
                limit=settings.lm_eval_limit,
                check_stop=run.check_stop,
            )
        for name, score in scores.items():
            run.log.print(f"step {step:>6}  {name} {score:.4f}")
        return scores
