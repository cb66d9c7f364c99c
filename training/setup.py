"""Bring up a run: data, model, optimizer, what it resumes from, and the header that says so."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from data_prep.byte_level import bytes_of_tokens
from data_prep.cli import UserError
from eval.harness import load_tasks
from eval.hellaswag import HellaSwag, read_items
from eval.launch import on_cpu
from eval.models import compile_blocks
from modeling import GPTConfig, GPTModel, flops_per_token
from training.batches import Ahead, Batches
from training.checkpoint import RunState, complete_checkpoints, load_state, load_training_state
from training.config import TrainingConfig
from training.data import Data, load_data, validation_sequences
from training.environment import write_environment
from training.metrics import RunLog, peak_flops
from training.optimizer import make_optimizer
from training.topology import describe_device, make_accelerator


@dataclass
class Run:
    """What the training loop works with.

    Attributes:
        model: as `accelerator.prepare` returns it, in the wrappers of distribution if there are any.
        train_ahead: this rank's share of a global batch, by its position.
        val_sequences: sequences of a validation, always the first ones of the validation split.
        val_bytes: bytes of text that their labels stand for.
        hellaswag: its items under each rule that is asked for.
        task_manager: what the lm-evaluation-harness knows of its tasks; None if none are asked for.
    """

    config: TrainingConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tokenizer: Any
    data: Data
    train_data: Batches
    train_ahead: Ahead
    val_data: Batches
    val_sequences: int
    val_bytes: int
    hellaswag: list[HellaSwag]
    task_manager: Any
    state: RunState
    log: RunLog

    @property
    def checkpoints(self) -> Path:
        return checkpoints_folder(self.config)

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

    def close(self) -> None:
        """End the threads, the logs, the trackers and the process group.

        The wrapped model goes first: as the last owner of the process group it would wait for the group's threads while
        holding the interpreter's lock, which they may be waiting for.
        """
        self.train_ahead.close()
        self.log.close()
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)
        self.accelerator.end_training()

    def sum_over_processes(self, *values: float) -> list[float]:
        """Each of `values` summed over all processes, in float64 where the device has it."""
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.accelerator.device)).tolist()


def setup(config: TrainingConfig) -> Run:
    """Bring up all that the loop needs, the cheap checks first.

    Raises:
        UserError: for whatever the user can mend.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    checkpoint = find_checkpoint(config)
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        data = load_data(config)
    state = RunState(data=data.identity(config))
    if checkpoint is not None:
        state = resumed_state(config, checkpoint, state.data)

    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_folder)
    with accelerator.main_process_first():
        hellaswag = load_hellaswag(config, tokenizer)
        task_manager = (
            load_tasks(config.run.lm_eval_tasks, config.model.n_positions) if config.run.lm_eval_every else None
        )

    model = make_model(config, data, checkpoint)
    parameters = model.num_parameters()
    optimizer = make_optimizer(model, config.optimizer)
    torch.manual_seed(config.run.seed + accelerator.process_index)  # dropout differs between processes
    model, optimizer = accelerator.prepare(model, optimizer)
    if checkpoint is not None:
        load_training_state(accelerator, model, optimizer, state, checkpoint)

    train_data, val_data = (data.batches(config, split) for split in ("train", "val"))
    train_ahead = Ahead(
        partial(
            train_data.micro_batches,
            micro_batch=config.optimizer.micro_batch,
            accumulation_steps=accelerator.gradient_accumulation_steps,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        ),
        accelerator.device,
    )
    val_sequences = validation_sequences(val_data, config.run.val_tokens)
    val_labels = val_data.sequences(0, val_sequences)["shift_labels"]

    config.run_folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        write_environment(config, accelerator, data, parameters)
        print(header(config, accelerator, data, parameters, state))
    if config.run.report_to != "none":
        accelerator.init_trackers(config.run.run_name, config={k: str(v) for k, v in config.to_dict().items()})
    log = RunLog(
        config.run_folder, state.step, config.optimizer.max_steps, config.run.log_every, accelerator.is_main_process
    )
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        data=data,
        train_data=train_data,
        train_ahead=train_ahead,
        val_data=val_data,
        val_sequences=val_sequences,
        val_bytes=int(bytes_of_tokens(tokenizer)[val_labels.numpy()].sum()),
        hellaswag=hellaswag,
        task_manager=task_manager,
        state=state,
        log=log,
    )


def load_hellaswag(config: TrainingConfig, tokenizer: Any) -> list[HellaSwag]:
    """The items of HellaSwag under each of the run's rules; none if the run does not evaluate on it."""
    settings = config.run
    if not settings.hellaswag_every:
        return []
    file = None if settings.hellaswag_data is None else Path(settings.hellaswag_data)
    items = read_items(file)[: settings.hellaswag_limit]
    return [HellaSwag.prepare(items, rule, tokenizer) for rule in settings.hellaswag_rules]


def checkpoints_folder(config: TrainingConfig) -> Path:
    return config.run_folder / "checkpoints"


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint to resume from, None to start anew; a run that is there is never overwritten unasked."""
    complete = complete_checkpoints(checkpoints_folder(config))
    if config.run.resume:
        if not complete:
            raise UserError(f"{config.run_folder} has no complete checkpoint to resume from; start without --resume")
        return complete[-1]
    if complete:
        raise UserError(
            f"{config.run_folder} holds a run already (its last checkpoint is {complete[-1].name}); go on with it by "
            f"--resume, choose another --run_name, or remove that folder"
        )
    return None


def resumed_state(config: TrainingConfig, checkpoint: Path, data: dict[str, Any]) -> RunState:
    """The state saved in `checkpoint`, refused where the run would go on with another model or other data."""
    state = load_state(checkpoint)
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    sizes = {name: getattr(config.model, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
    if different := [f"{name}={saved[name]}, not {size}" for name, size in sizes.items() if saved[name] != size]:
        raise UserError(
            f"{checkpoint} is another model ({'; '.join(different)}); resume with the settings in "
            f"{config.run_folder / 'config.yaml'}"
        )
    if different := [name for name in data if data[name] != state.data.get(name)]:
        raise UserError(
            f"{checkpoint} was trained on other data ({', '.join(different)}); resume with the data and the "
            f"settings in {config.run_folder / 'config.yaml'}"
        )
    if state.step >= config.optimizer.max_steps:
        raise UserError(f"{checkpoint} is at step {state.step} of max_steps={config.optimizer.max_steps}; raise it")
    return state


def make_model(config: TrainingConfig, data: Data, checkpoint: Path | None) -> GPTModel:
    """A model with the data's vocabulary: new, its weights drawn from the run's seed, or that of a checkpoint."""
    settings = config.model
    model_config = GPTConfig(
        vocab_size=data.tokenizer["vocab_size"],
        n_layer=settings.n_layer,
        n_embd=settings.n_embd,
        n_head=settings.n_head,
        n_positions=settings.n_positions,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
        bos_token_id=data.tokenizer["eos_token_id"],
        eos_token_id=data.tokenizer["eos_token_id"],
    )
    try:
        if checkpoint is None:
            torch.manual_seed(config.run.seed)
            model = GPTModel._from_config(model_config, attn_implementation=settings.attn_implementation)
        else:
            model = GPTModel.from_pretrained(
                checkpoint, config=model_config, dtype=torch.float32, attn_implementation=settings.attn_implementation
            )
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot make the model: {' '.join(str(error).split())}") from error
    if settings.gradient_checkpointing:
        # Renamed between the versions of transformers that this runs with.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if config.run.compile == "on" or (config.run.compile == "auto" and torch.cuda.is_available() and not on_cpu()):
        compile_blocks(model)
    return model.train()


def header(config: TrainingConfig, accelerator: Accelerator, data: Data, parameters: int, state: RunState) -> str:
    """What is about to happen, in a few lines."""
    settings, optimizer, processes = config.model, config.optimizer, accelerator.num_processes
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    counted = f"{processes} process{'es' if processes > 1 else ''}"
    begin = f"from step {state.step}" if state.step else "from random weights"
    total = optimizer.max_steps * optimizer.batch_tokens
    sources = [
        f"data    {folder}: {manifest.tokens('train'):,} training tokens "
        f"({share * total / manifest.tokens('train'):.2f} epochs), {manifest.tokens('val'):,} for validation"
        + (f", {share:.1%} of the run" if len(data.folders) > 1 else "")
        for folder, manifest, share in zip(data.folders, data.manifests, data.shares, strict=True)
    ]
    return "\n".join(
        [
            f"model   {parameters:,} parameters: {settings.n_layer} layers, width {settings.n_embd}, "
            f"{settings.n_head} heads, context {settings.n_positions}, vocabulary {data.tokenizer['vocab_size']}",
            *sources,
            f"batch   {optimizer.batch_tokens:,} tokens = {counted} x "
            f"{accelerator.gradient_accumulation_steps} accumulated x {optimizer.micro_batch} sequences x "
            f"{config.sequence_length}",
            f"steps   {optimizer.max_steps} {begin}: {total:,} tokens",
            f"device  {processes} x {describe_device(accelerator.device)}, {precision}",
            f"run     {config.run_folder}",
        ]
    )
