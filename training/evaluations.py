"""Evaluations during a run: validation loss, HellaSwag, lm-evaluation-harness, samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from eval.common.generation import Sampling, generate, isolated_random_state
from eval.harness import evaluate_tasks, load_tasks
from eval.hellaswag import HellaSwag, read_items
from eval.loss import bits_per_byte, summed_loss
from training.engine.data import Batches, Data, validation_sequences
from training.run import Evaluation, Run
from training.settings.schema import TrainingConfig


def make_evaluations(config: TrainingConfig, data: Data, train_data: Batches, tokenizer: Any) -> list[Evaluation]:
    """Creates the run's evaluations, in the order in which they run."""
    settings, val_data = config.evaluation, data.batches(config, "val")
    sequences = validation_sequences(val_data, settings.val_tokens)
    text_bytes = data.val_text_bytes(val_data, sequences, tokenizer)
    evaluations: list[Evaluation] = [Validation(settings.eval_steps, val_data, train_data, sequences, text_bytes)]
    if settings.hellaswag_every:
        file = None if settings.hellaswag_data is None else Path(settings.hellaswag_data)
        task = HellaSwag.prepare(read_items(file)[: settings.hellaswag_limit], "completion", tokenizer)
        evaluations.append(HellaSwagEvaluation(settings.hellaswag_every, task))
    if settings.lm_eval_every:
        tasks = load_tasks(settings.lm_eval_tasks, config.model.n_positions)
        evaluations.append(HarnessEvaluation(settings.lm_eval_every, tokenizer, tasks))
    evaluations.append(Samples(settings.sample_every, tokenizer))
    return evaluations


@dataclass
class Validation(Evaluation):
    """Loss on the same first sequences of the validation split each time.

    Attributes:
        val_data, train_data: the batches of both splits.
        sequences: of one validation.
        text_bytes: of the text that their labels stand for; None if neither the tokens nor the manifests tell it.
    """

    at_start = True
    at_checkpoints = True
    val_data: Batches
    train_data: Batches
    sequences: int
    text_bytes: int | None

    def run(self, run: Run) -> dict[str, Any]:
        """Loss in nats per token, and bits per byte of text. Collective: each rank takes its part of the sequences."""
        accelerator, step = run.accelerator, run.state.step
        batches = self.val_data.for_rank(
            self.sequences, run.micro_batch, accelerator.process_index, accelerator.num_processes
        )
        nats, tokens = run.sum_over_processes(*summed_loss(run.bare_model, batches, run.check_stop))
        losses = {"val_loss": nats / tokens}
        shown = "bits per byte not available"
        if self.text_bytes:
            losses["val_bits_per_byte"] = bits_per_byte(nats, self.text_bytes)
            shown = f"{losses['val_bits_per_byte']:.3f} bits per byte"
        run.log.print(f"step {step:>6}  validation loss {losses['val_loss']:.4f}, {shown}")
        consumed = run.data.consumed(self.train_data, run.state.position)
        for folder, read in consumed.items() if len(consumed) > 1 else ():
            run.log.print(
                f"{'':13}{folder}: {read['share']:.1%}, {read['tokens']:,} tokens, {read['epochs']:.2f} epochs"
            )
        run.log.note(data=consumed)
        return losses


@dataclass
class HellaSwagEvaluation(Evaluation):
    """HellaSwag accuracy under `completion`, the rule of GPT-2's and GPT-3's published numbers."""

    at_start = True
    task: HellaSwag

    def run(self, run: Run) -> dict[str, Any]:
        """`acc` and `acc_norm`. Collective: the ranks share the items."""
        result = self.task.evaluate(run.accelerator, run.bare_model, before_batch=run.check_stop)
        run.log.print(f"step {run.state.step:>6}  HellaSwag ({result.rule}) {result}")
        return result.metrics()


@dataclass
class HarnessEvaluation(Evaluation):
    """lm-evaluation-harness on chosen tasks; full results are kept next to the checkpoints.

    Attributes:
        task_manager: the harness's index of its tasks.
    """

    tokenizer: Any
    task_manager: Any

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


@dataclass
class Samples(Evaluation):
    """Continuations of the prompts in the settings, with random numbers of their own."""

    tokenizer: Any

    def run(self, run: Run) -> dict[str, Any]:
        """Generated texts with their prompts, the same for any number of processes. Collective.

        Each process generates its share. All ranks of a sharded model generate all texts, as none can without the rest.
        """
        settings, accelerator = run.config.evaluation, run.accelerator
        rank, turns = (0, 1) if accelerator.is_fsdp2 else (accelerator.process_index, accelerator.num_processes)
        prompts = settings.sample_prompts
        mine = []
        for first in range(0, len(prompts), turns):
            run.check_stop()
            if (number := first + rank) < len(prompts):
                sampling = Sampling(max_new_tokens=settings.sample_tokens, seed=run.config.run.seed + number)
                # Generation would recompile for every length; past torch's limit training would lose its own code.
                with torch.compiler.set_stance("force_eager"):
                    text = generate(run.bare_model, self.tokenizer, prompts[number], sampling).texts[0]
                mine.append((number, text))
        texts = dict(gather_object(mine))
        for number, prompt in enumerate(prompts):
            run.log.sample(run.state.step, prompt, texts[number])
        return {f"sample/{number}": prompt + texts[number] for number, prompt in enumerate(prompts)}
