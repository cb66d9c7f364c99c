"""Builds a run: data, model, optimizer, the state to resume from, and the printed header."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from data_prep.common.command_line import UserError
from data_prep.tokenization.tokenizer import hf_tokenizer, tokenizer_files, tokenizer_problem
from eval.report import remove_report
from modeling import flops_per_token
from training.checkpointing.checkpoint import load_training_state
from training.checkpointing.store import RunState
from training.checkpointing.writer import Saver
from training.engine.data import Batch, Batches, Data, Prefetcher, load_data
from training.engine.distributed import accelerator_for, decide_on_main, describe_device
from training.engine.model import check_initial_model, find_micro_batch, make_model
from training.engine.optimizer import describe, make_optimizer
from training.evaluations import make_evaluations
from training.monitoring.log import RunLog, write_environment
from training.monitoring.metrics import MetricsQueue
from training.monitoring.trackers import TRACKERS, start_tracker
from training.preflight import room_for_checkpoints
from training.publishing import Uploads
from training.resume import AlreadyFinished, find_checkpoint, is_finished, resumed_state
from training.run import Run, StopRequest
from training.settings.schema import TrainingConfig

_STATE_BYTES = 12  # of a parameter in a checkpoint: weight and two moments, in float32


def build_run(config: TrainingConfig, stop: StopRequest) -> Run:
    """Builds everything that the loop needs, cheap checks first. Collective.

    Raises:
        UserError: for everything that the user can correct.
        AlreadyFinished: if `auto_resume` finds nothing left to do.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    accelerator = accelerator_for(config)
    main = accelerator.is_main_process
    data, checkpoint, state = _find_start(config, accelerator)
    tokenizer = hf_tokenizer(data.tokenizer_folder)
    if problem := tokenizer_problem(tokenizer, data.tokenizer):
        raise UserError(f"{data.tokenizer_folder}: {problem}; {data.manifests[0].remedy}")
    train_data = data.batches(config, "train")
    with accelerator.main_process_first():
        evaluations = make_evaluations(config, data, train_data, tokenizer)
    if checkpoint is None and (name := config.model.model_name_or_path) is not None:
        check_initial_model(name, config, data, tokenizer)
    model, optimizer, micro_batch = _prepare_model(config, accelerator, data, train_data, checkpoint)
    if checkpoint is not None:
        load_training_state(accelerator, model, optimizer, state, checkpoint)
    bare_model = accelerator.unwrap_model(model)
    parameters = bare_model.num_parameters()
    decide_on_main(accelerator, lambda: room_for_checkpoints(config, _STATE_BYTES * parameters))
    config.run_folder.mkdir(parents=True, exist_ok=True)
    if main:
        remove_report(config.report_folder)  # of the run before it was resumed
        flops = flops_per_token(bare_model.config, config.sequence_length)
        write_environment(config, accelerator, data, parameters, flops)
    is_branch = checkpoint is not None and checkpoint.resolve().parent != config.checkpoints.resolve()

    def micro_batches(position: int) -> list[Batch]:
        """This rank's part of the global batch at a position."""
        start = 0 if config.data.overfit_single_batch else position
        count = config.batch_plan.size(start * config.sequence_length) // config.sequence_length
        processes = (accelerator.process_index, accelerator.num_processes)
        return train_data.micro_batches(start, start + count, micro_batch, *processes)

    run = Run(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        micro_batch=micro_batch,
        tokenizer_files={file.name: file.read_bytes() for file in tokenizer_files(data.tokenizer_folder)},
        data=data,
        prefetcher=Prefetcher(micro_batches, accelerator.device),
        evaluations=evaluations,
        state=state,
        log=RunLog(config.run_folder, state.step, config.max_steps, config.logging.logging_steps, main),
        saver=Saver(config.checkpoints, stop.request),
        stop=stop,
        metrics=MetricsQueue(depth=1 if accelerator.device.type == "cuda" else 0),
        first_step=state.step,
        saved_step=None if checkpoint is None or is_branch else state.step,
    )
    run.log.print(header(run))
    state.num_processes = accelerator.num_processes
    if main:
        names = [name for name in map(str, accelerator.log_with) if name in TRACKERS]
        accelerator.trackers = [run.log, *(start_tracker(name, config, state.step) for name in names)]
        if config.hub.push_to_hub and not config.run.preflight:
            run.uploads = Uploads(config.run_folder, run.log.flush, every=config.hub.hub_strategy == "all")
    return run


def _find_start(config: TrainingConfig, accelerator: Accelerator) -> tuple[Data, Path | None, RunState]:
    """Data, the checkpoint to resume from (None for a new run), and the initial state. Collective."""
    checkpoint, messages = decide_on_main(accelerator, lambda: find_checkpoint(config))
    for line in messages if accelerator.is_main_process else ():
        print(line)
    with accelerator.main_process_first():
        data = load_data(config)
    settings = config.result_affecting_settings(accelerator.mixed_precision)
    state = RunState(data.identity(config), settings, accelerator.num_processes)
    if checkpoint is not None:
        state = decide_on_main(accelerator, lambda: resumed_state(config, checkpoint, state))
        if is_finished(config, state):
            raise AlreadyFinished(f"{config.run_folder} is finished, at step {state.step}")
    return data, checkpoint, state


def _prepare_model(
    config: TrainingConfig, accelerator: Accelerator, data: Data, train_data: Batches, checkpoint: Path | None
) -> tuple[nn.Module, AcceleratedOptimizer, int]:
    """Model and optimizer prepared by Accelerate, and the micro-batch, searched for if it is `auto`. Collective."""
    bare_model = make_model(config, data, checkpoint or config.model.model_name_or_path)
    optimizer = make_optimizer(bare_model, config.optimizer, accelerator.mixed_precision)
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    if config.optimizer.per_device_train_batch_size == "auto":
        micro_batch = find_micro_batch(config, accelerator, model, optimizer, train_data)
    else:
        micro_batch = config.micro_batch(accelerator.num_processes)
    torch.manual_seed(config.run.seed + accelerator.process_index)  # dropout differs between ranks
    return model, optimizer, micro_batch


def header(run: Run) -> str:
    """Describes the run in a few lines."""
    config, accelerator, data, state = run.config, run.accelerator, run.data, run.state
    settings, processes = config.model, accelerator.num_processes
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    counted = f"{processes} process{'es' if processes > 1 else ''}"
    start = "from random weights" if settings.model_name_or_path is None else f"from {settings.model_name_or_path}"
    if state.step:
        start = f"from step {state.step}"
    if state.num_processes != processes:
        start += f" (saved by {state.num_processes}, now {processes}: same batches, losses equal up to rounding)"
    plan = config.batch_plan
    total = plan.tokens(config.max_steps)
    accumulated = plan.batch_tokens // (run.micro_batch * config.sequence_length * processes)
    ramp = f", from {plan.ramp_start:,} in the first {plan.ramp_tokens:,}" if plan.ramp_tokens else ""
    sources = [
        f"data    {name}: {manifest.tokens('train'):,} training tokens "
        f"({share * total / manifest.tokens('train'):.2f} epochs), {manifest.tokens('val'):,} for validation"
        + (f", {share:.1%} of the run" if len(data.folders) > 1 else "")
        for name, manifest, share in zip(data.names, data.manifests, data.shares, strict=True)
    ]
    return "\n".join(
        [
            f"model   {run.bare_model.num_parameters():,} parameters: {settings.n_layer} layers, "
            f"width {settings.n_embd}, {settings.n_head} heads, context {settings.n_positions}, "
            f"vocabulary {data.tokenizer.vocab_size}",
            *sources,
            f"optim   {describe(run.optimizer)}",
            f"batch   {plan.batch_tokens:,} tokens = {counted} x {accumulated} accumulated x "
            f"{run.micro_batch} sequences x {config.sequence_length}{ramp}",
            f"steps   {config.max_steps} {start}: {total:,} tokens",
            f"device  {processes} x {describe_device(accelerator.device)}, {precision}",
            f"run     {config.run_folder}",
            *([f"hub     {config.hub.hub_model_id}"] if config.hub.push_to_hub else []),
        ]
    )
