"""Bring up a run: data, model, optimizer, what it resumes from, and the header that says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data_prep.common.command_line import UserError
from data_prep.tokenization.byte_level import bytes_of_tokens
from data_prep.tokenization.tokenizer import hf_tokenizer, tokenizer_files, tokenizer_problem
from eval.harness import load_tasks
from eval.hellaswag import HellaSwag, read_items
from eval.report import remove_report
from modeling import flops_per_token
from training.checkpointing.snapshot import load_training_state
from training.checkpointing.storage import RunState
from training.checkpointing.writer import Saver
from training.engine.batches import Batch, Batches, Prefetcher
from training.engine.data import Data, load_data, validation_sequences
from training.engine.distributed import agreed, describe_device, make_accelerator
from training.engine.model import check_initial_model, find_micro_batch, make_model
from training.engine.optimizer import make_optimizer
from training.loop.run import Run
from training.loop.stopping import StopRequest
from training.publishing.uploader import Uploads
from training.records.environment import write_environment
from training.records.run_log import RunLog
from training.records.step_metrics import Meter
from training.records.versions import untested_versions
from training.resilience.disk_space import room_for_checkpoints
from training.resilience.resume import AlreadyFinished, find_checkpoint, is_finished, resumed_state
from training.settings.schedule import BatchPlan
from training.settings.schema import TrainingConfig


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
