"""Texts that the model writes."""

from dataclasses import dataclass
from typing import Any

import torch

from eval.generate import Sampling, generate
from training.loop.run import Run


@dataclass
class Samples:
    """Continuations of the prompts in the settings, drawn with random numbers that training does not share."""

    every: int
    tokenizer: Any
    at_start: bool = False
    at_checkpoints: bool = False

    def run(self, run: Run) -> dict[str, Any]:
        """The texts, each with its prompt. Collective."""
        settings, texts = run.config.evaluation, {}
        for number, prompt in enumerate(settings.sample_prompts):
            sampling = Sampling(max_new_tokens=settings.sample_tokens, seed=run.config.run.seed + number)
            # Generation would recompile for every length; past torch's limit training would lose its own code.
            with torch.compiler.set_stance("force_eager"):
                (text,) = generate(run.bare_model, self.tokenizer, prompt, sampling).texts
            run.log.sample(run.state.step, prompt, text)
            texts[f"sample/{number}"] = prompt + text
        return texts
