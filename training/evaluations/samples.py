"""Texts that the model writes."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from eval.common.generation import Sampling, generate
from training.loop.run import Run


@dataclass
class Samples:
    """Continuations of the prompts in the settings, drawn with random numbers that training does not share."""

    every: int
    tokenizer: Any
    at_start: bool = False
    at_checkpoints: bool = False

    def run(self, run: Run) -> dict[str, Any]:
        """The texts, each with its prompt: the same ones for any number of processes. Collective.

        Each process generates its share. All ranks of a sharded model generate all texts, as none can without the rest.
        """
        prompts, accelerator = run.config.evaluation.sample_prompts, run.accelerator
        rank, turns = (0, 1) if accelerator.is_fsdp2 else (accelerator.process_index, accelerator.num_processes)
        mine = []
        for first in range(0, len(prompts), turns):
            run.check_stop()
            if (number := first + rank) < len(prompts):
                mine.append((number, self._sample(run, number, prompts[number])))
        texts = dict(gather_object(mine))
        for number, prompt in enumerate(prompts):
            run.log.sample(run.state.step, prompt, texts[number])
        return {f"sample/{number}": prompt + texts[number] for number, prompt in enumerate(prompts)}

    def _sample(self, run: Run, number: int, prompt: str) -> str:
        sampling = Sampling(max_new_tokens=run.config.evaluation.sample_tokens, seed=run.config.run.seed + number)
        # Generation would recompile for every length; past torch's limit training would lose its own code.
        with torch.compiler.set_stance("force_eager"):
            return generate(run.bare_model, self.tokenizer, prompt, sampling).texts[0]
