"""Bring up a run: data, model, optimizer, what it resumes from, and the header that says so."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from data_prep.byte_level import bytes_of_tokens
from data_prep.cli import UserError, first_line
from data_prep.tokenizer import hf_tokenizer, tokenizer_files, tokenizer_problem
from eval.harness import load_tasks
from eval.hellaswag import HellaSwag, read_items
from eval.report import remove_report
from modeling import GPTModel, flops_per_token
from training.batches import Batch, Batches, Prefetcher
from training.checkpoint import load_training_state
from training.checkpoint_folders import RunState
from training.data import Data, load_data, validation_sequences
from training.disk import room_for_checkpoints
from training.environment import write_environment
from training.meter import Meter
from training.metrics import RunLog
from training.model import check_initial_model, find_micro_batch, make_model
from training.optimizer import make_optimizer
from training.precision import peak_flops
from training.resume import AlreadyFinished, find_checkpoint, is_finished, resumed_state
from training.saving import Saver
from training.schedule import BatchPlan, Schedule
from training.settings import TrainingConfig
from training.stopping import StopRequest
from training.topology import agreed, describe_device, make_accelerator
from training.uploads import Uploads
from training.versions import untested_versions


@dataclass
class Run:
    """What the training loop works with.

    Attributes:
        model: as `accelerator.prepare` returns it, in the wrappers of distribution if there are any.
        batch_plan, schedule: the tokens and the learning rate of each step.
        prefetcher: this rank's share of a global batch, by its position.
        tokenizer_files: their contents by their names, which go into each checkpoint.
        val_sequences: sequences of a validation, always the first ones of the validation split.
        val_bytes: bytes of text that their labels stand for.
        hellaswag: its items under each rule that is asked for.
        task_manager: what the lm-evaluation-harness knows of its tasks; None if none are asked for.
        uploads: to the Hub; None if there are none, and but on the main process.
        tracking: whether the trackers still take what they are given.
        stop: this process's request to end the run, and `stopping`, what all of them have agreed on.
        meter: of the steps, with the one that has not been recorded yet.
    """

    config: TrainingConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_plan: BatchPlan
    schedule: Schedule
    tokenizer: Any
    tokenizer_files: dict[str, bytes]
    data: Data
    train_data: Batches
    prefetcher: Prefetcher
    val_data: Batches
    val_sequences: int
    val_bytes: int
    hellaswag: list[HellaSwag]
    task_manager: Any
    state: RunState
    log: RunLog
    saver: Saver
    uploads: Uploads | None
    stop: StopRequest
    meter: Meter
    stopping: bool = False
    tracking: bool = True

    @property
    def checkpoints(self) -> Path:
        return self.config.checkpoints

    @property
    def bare_model(self) -> GPTModel:
        """The model without wrappers, for what needs no gradients."""
        return self.accelerator.unwrap_model(self.model)

    def flops_utilisation(self, tokens_per_second: float) -> float | None:
        """The share of all devices' peak that training's arithmetic takes (MFU); None where the peak is not known."""
        peak = peak_flops(describe_device(self.accelerator.device), self.accelerator.mixed_precision)
        if peak is None:
            return None
        flops = flops_per_token(self.bare_model.config, self.config.sequence_length)
        return flops * tokens_per_second / (peak * self.accelerator.num_processes)

    def track(self, values: dict[str, Any], step: int) -> None:
        """Give values of a step to the trackers; once one of them fails, the run goes on without them."""
        if not self.tracking:
            return
        try:
            self.accelerator.log(values, step=step)
        except Exception as error:  # theirs, of whatever kind
            self.tracking = False
            self.log.print(f"the trackers get nothing any more: {type(error).__name__}: {first_line(error)}")

    def close(self, failed: bool = False) -> None:
        """End the threads, the logs, the trackers and the process group.

        The wrapped model goes first: as the last owner of the process group it would wait for the group's threads while
        holding the interpreter's lock, which they may be waiting for.

        Args:
            failed: leave the process group as it is, whose other processes may be waiting for this one: its end is what
                tells them.
        """
        self.prefetcher.close()
        self.log.close()
        if failed:
            if self.uploads is not None:
                self.uploads.close()
            return
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)
        if not self.tracking:
            self.accelerator.trackers = []  # which would fail again
        self.accelerator.end_training()

    def sum_over_processes(self, *values: float) -> list[float]:
        """Each of `values` summed over all processes, in float64 where the device has it."""
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.accelerator.device)).tolist()


def setup(config: TrainingConfig, stop: StopRequest) -> Run:
    """Bring up all that the loop needs, the cheap checks first.

    Raises:
        UserError: for whatever the user can mend.
        AlreadyFinished: where `auto_resume` finds nothing left to do.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(config)
    checkpoint, found = agreed(accelerator, lambda: find_checkpoint(config))
    for line in [*untested_versions(), *found] if accelerator.is_main_process else ():
        print(line)
    with accelerator.main_process_first():
        data = load_data(config)
    state = RunState(data.identity(config), config.deciding(accelerator.mixed_precision), accelerator.num_processes)
    if checkpoint is not None:
        state = agreed(accelerator, lambda: resumed_state(config, checkpoint, state))
        if is_finished(config, state):
            raise AlreadyFinished(f"{config.run_folder} is finished, at step {state.step}")

    tokenizer = hf_tokenizer(data.tokenizer_folder)
    if problem := tokenizer_problem(tokenizer, data.tokenizer):
        raise UserError(f"{data.tokenizer_folder}: {problem}; {data.manifests[0].remedy}")
    with accelerator.main_process_first():
        hellaswag = load_hellaswag(config, tokenizer)
        task_manager = (
            load_tasks(config.run.lm_eval_tasks, config.model.n_positions) if config.run.lm_eval_every else None
        )

    if checkpoint is None and config.model.init_from is not None:
        check_initial_model(config, data, tokenizer)
    model = make_model(config, data, checkpoint or config.model.init_from)
    parameters = model.num_parameters()
    optimizer = make_optimizer(model, config.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_data, val_data = (data.batches(config, split) for split in ("train", "val"))
    if config.optimizer.micro_batch == "auto":
        config.optimizer.micro_batch = find_micro_batch(config, accelerator, model, optimizer, train_data)
    torch.manual_seed(config.run.seed + accelerator.process_index)  # dropout differs between processes
    if checkpoint is not None:
        load_training_state(accelerator, model, optimizer, state, checkpoint)

    batch_plan = config.batch_plan
    prefetcher = Prefetcher(global_batches(config, batch_plan, accelerator, train_data), accelerator.device)
    val_sequences = validation_sequences(val_data, config.run.val_tokens)
    val_labels = val_data.sequences(0, val_sequences)["shift_labels"]

    # Weights and two moments, in float32.
    agreed(accelerator, lambda: room_for_checkpoints(config, 12 * parameters))
    config.run_folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_report(config.report_folder)  # of what the run was before it goes on
        flops = flops_per_token(accelerator.unwrap_model(model).config, config.sequence_length)
        write_environment(config, accelerator, data, parameters, flops)
        print(header(config, accelerator, data, parameters, state))
    if config.run.report_to != "none":
        accelerator.init_trackers(config.run.run_name, config={k: str(v) for k, v in config.to_dict().items()})
    state.num_processes = accelerator.num_processes
    saver = Saver(config.checkpoints)
    publishing = config.hub.push_to_hub is not None and not config.run.preflight
    log = RunLog(config.run_folder, state.step, config.max_steps, config.run.log_every, accelerator.is_main_process)
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        batch_plan=batch_plan,
        schedule=config.schedule,
        tokenizer=tokenizer,
        tokenizer_files={file.name: file.read_bytes() for file in tokenizer_files(data.tokenizer_folder)},
        data=data,
        train_data=train_data,
        prefetcher=prefetcher,
        val_data=val_data,
        val_sequences=val_sequences,
        val_bytes=int(bytes_of_tokens(tokenizer)[val_labels.numpy()].sum()),
        hellaswag=hellaswag,
        task_manager=task_manager,
        state=state,
        log=log,
        saver=saver,
        uploads=Uploads(config.run_folder, saver, log.flush) if publishing and accelerator.is_main_process else None,
        stop=stop,
        meter=Meter(accelerator.device),
    )


def load_hellaswag(config: TrainingConfig, tokenizer: Any) -> list[HellaSwag]:
    """The items of HellaSwag under each of the run's rules; none if the run does not evaluate on it."""
    settings = config.run
    if not settings.hellaswag_every:
        return []
    file = None if settings.hellaswag_data is None else Path(settings.hellaswag_data)
    items = read_items(file)[: settings.hellaswag_limit]
    return [HellaSwag.prepare(items, rule, tokenizer) for rule in settings.hellaswag_rules]


def global_batches(
    config: TrainingConfig, plan: BatchPlan, accelerator: Accelerator, train_data: Batches
) -> Callable[[int], list[Batch]]:
    """What gives this process's share of the global batch that begins at a position."""

    def make(position: int) -> list[Batch]:
        if config.debug.overfit_single_batch:
            position = 0
        batch_tokens = plan.size(position * config.sequence_length)
        return train_data.micro_batches(
            position,
            micro_batch=int(config.optimizer.micro_batch),
            accumulation_steps=config.accumulation_steps(batch_tokens, accelerator.num_processes),
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    return make


def header(config: TrainingConfig, accelerator: Accelerator, data: Data, parameters: int, state: RunState) -> str:
    """What is about to happen, in a few lines."""
    settings, optimizer, processes = config.model, config.optimizer, accelerator.num_processes
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    counted = f"{processes} process{'es' if processes > 1 else ''}"
    begin = "from random weights" if settings.init_from is None else f"from {settings.init_from}"
    if state.step:
        begin = f"from step {state.step}"
    if state.num_processes != processes:
        begin += f" (saved by {state.num_processes}, now {processes}: the same batches, losses but for rounding)"
    plan = config.batch_plan
    total = plan.tokens(config.max_steps)
    accumulated = config.accumulation_steps(plan.batch_tokens, processes)
    ramp = f", from {plan.ramp_start:,} in the first {plan.ramp_tokens:,}" if plan.ramp_tokens else ""
    sources = [
        f"data    {name}: {manifest.tokens('train'):,} training tokens "
        f"({share * total / manifest.tokens('train'):.2f} epochs), {manifest.tokens('val'):,} for validation"
        + (f", {share:.1%} of the run" if len(data.folders) > 1 else "")
        for name, manifest, share in zip(data.names, data.manifests, data.shares, strict=True)
    ]
    return "\n".join(
        [
            f"model   {parameters:,} parameters: {settings.n_layer} layers, width {settings.n_embd}, "
            f"{settings.n_head} heads, context {settings.n_positions}, vocabulary {data.tokenizer.vocab_size}",
            *sources,
            f"batch   {optimizer.batch_tokens:,} tokens = {counted} x "
            f"{accumulated} accumulated x {optimizer.micro_batch} sequences x {config.sequence_length}{ramp}",
            f"steps   {config.max_steps} {begin}: {total:,} tokens",
            f"device  {processes} x {describe_device(accelerator.device)}, {precision}",
            f"run     {config.run_folder}",
            *([f"hub     {config.hub.push_to_hub}"] if config.hub.push_to_hub else []),
        ]
    )
