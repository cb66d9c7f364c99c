"""Builds a run: data, model, optimizer, the state to resume from, and the header on screen."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from data_prep.common.command_line import UserError
from data_prep.tokenization.tokenizer import hf_tokenizer, tokenizer_files, tokenizer_problem
from eval.report import remove_report
from modeling import GPTModel, flops_per_token
from training.checkpointing.checkpoint import load_training_state
from training.checkpointing.store import AlreadyFinished, RunState, find_checkpoint, is_finished, resumed_state
from training.checkpointing.writer import Saver
from training.engine.data import Batch, Batches, Data, Prefetcher, load_data
from training.engine.distributed import accelerator_for, decide_on_main, describe_device
from training.engine.model import check_initial_model, find_micro_batch, make_model
from training.engine.optimizer import describe, make_optimizer
from training.evaluations import HarnessEvaluation, HellaSwagEvaluation, Samples, Validation
from training.monitoring.environment import write_environment
from training.monitoring.log import RunLog
from training.monitoring.metrics import MetricsQueue
from training.monitoring.stopping import StopRequest
from training.monitoring.trackers import TRACKERS, start_tracker
from training.preflight import room_for_checkpoints
from training.publishing import Uploads
from training.run import Evaluation, Run
from training.settings.schedule import BatchPlan
from training.settings.schema import TrainingConfig

_STATE_BYTES = 12  # of a parameter in a checkpoint: weight and two moments, in float32


def setup(config: TrainingConfig, stop: StopRequest) -> Run:
    """Builds everything that the loop needs, the cheap checks first. Collective.

    Raises:
        UserError: for everything that the user can correct.
        AlreadyFinished: if `auto_resume` finds nothing left to do.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    accelerator = accelerator_for(config)
    data, checkpoint, state = _find_start(config, accelerator)
    tokenizer = hf_tokenizer(data.tokenizer_folder)
    if problem := tokenizer_problem(tokenizer, data.tokenizer):
        raise UserError(f"{data.tokenizer_folder}: {problem}; {data.manifests[0].remedy}")
    train_data = data.batches(config, "train")
    with accelerator.main_process_first():
        evaluations: list[Evaluation] = [
            Validation.prepare(config, data, train_data, tokenizer),
            *HellaSwagEvaluation.prepare(config.evaluation, tokenizer),
            *HarnessEvaluation.prepare(config, tokenizer),
            Samples(config.evaluation.sample_every, tokenizer),
        ]
    if checkpoint is None and (name := config.model.model_name_or_path) is not None:
        check_initial_model(name, config, data, tokenizer)
    model, optimizer, micro_batch = _prepare_model(config, accelerator, data, train_data, checkpoint)
    if checkpoint is not None:
        load_training_state(accelerator, model, optimizer, state, checkpoint)
    batch_plan = config.batch_plan
    prefetcher = Prefetcher(
        global_batches(config, batch_plan, accelerator, train_data, micro_batch), accelerator.device
    )
    is_branch = checkpoint is not None and checkpoint.resolve().parent != config.checkpoints.resolve()
    log = _open_log(config, accelerator, data, accelerator.unwrap_model(model), optimizer, state, micro_batch)
    state.num_processes = accelerator.num_processes
    saver = Saver(config.checkpoints, stop.request)
    publishing = config.hub.push_to_hub and not config.run.preflight and accelerator.is_main_process
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        micro_batch=micro_batch,
        batch_plan=batch_plan,
        schedule=config.schedule,
        tokenizer_files={file.name: file.read_bytes() for file in tokenizer_files(data.tokenizer_folder)},
        data=data,
        prefetcher=prefetcher,
        evaluations=evaluations,
        state=state,
        log=log,
        saver=saver,
        uploads=Uploads(config.run_folder, log.flush, every=config.hub.hub_strategy == "all") if publishing else None,
        stop=stop,
        metrics=MetricsQueue(depth=1 if accelerator.device.type == "cuda" else 0),
        first_step=state.step,
        saved_step=None if checkpoint is None or is_branch else state.step,
    )


def _find_start(config: TrainingConfig, accelerator: Accelerator) -> tuple[Data, Path | None, RunState]:
    """The data, the checkpoint to resume from (None for a new run), and the state at the start. Collective."""
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
    """Model and optimizer as Accelerate prepares them, and the micro-batch, found by trying if asked to. Collective."""
    bare_model = make_model(config, data, checkpoint or config.model.model_name_or_path)
    optimizer = make_optimizer(bare_model, config.optimizer, accelerator.mixed_precision)
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    if config.optimizer.per_device_train_batch_size == "auto":
        micro_batch = find_micro_batch(config, accelerator, model, optimizer, train_data)
    else:
        micro_batch = config.micro_batch(accelerator.num_processes)
    torch.manual_seed(config.run.seed + accelerator.process_index)  # dropout differs between ranks
    return model, optimizer, micro_batch


def _open_log(
    config: TrainingConfig,
    accelerator: Accelerator,
    data: Data,
    model: GPTModel,
    optimizer: AcceleratedOptimizer,
    state: RunState,
    micro_batch: int,
) -> RunLog:
    """Makes the run's folder, prints the header, and starts the trackers, the run's own log first. Collective."""
    parameters = model.num_parameters()
    decide_on_main(accelerator, lambda: room_for_checkpoints(config, _STATE_BYTES * parameters))
    config.run_folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_report(config.report_folder)  # of the run before it was resumed
        write_environment(config, accelerator, data, parameters, flops_per_token(model.config, config.sequence_length))
        print(header(config, accelerator, data, parameters, describe(optimizer.optimizer), state, micro_batch))
    log = RunLog(
        config.run_folder, state.step, config.max_steps, config.logging.logging_steps, accelerator.is_main_process
    )
    names = [name for name in map(str, accelerator.log_with) if name in TRACKERS and accelerator.is_main_process]
    accelerator.trackers = [log, *(start_tracker(name, config, state.step) for name in names)]
    return log


def global_batches(
    config: TrainingConfig, plan: BatchPlan, accelerator: Accelerator, train_data: Batches, micro_batch: int
) -> Callable[[int], list[Batch]]:
    """A function that makes this rank's part of the global batch at a position."""

    def make(position: int) -> list[Batch]:
        if config.data.overfit_single_batch:
            position = 0
        batch_tokens = plan.size(position * config.sequence_length)
        return train_data.micro_batches(
            position,
            micro_batch=micro_batch,
            accumulation_steps=batch_tokens // (micro_batch * config.sequence_length * accelerator.num_processes),
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    return make


def header(
    config: TrainingConfig,
    accelerator: Accelerator,
    data: Data,
    parameters: int,
    optimizer: str,
    state: RunState,
    micro_batch: int,
) -> str:
    """A few lines about the run that begins."""
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
    accumulated = plan.batch_tokens // (micro_batch * config.sequence_length * processes)
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
            f"optim   {optimizer}",
            f"batch   {plan.batch_tokens:,} tokens = {counted} x {accumulated} accumulated x "
            f"{micro_batch} sequences x {config.sequence_length}{ramp}",
            f"steps   {config.max_steps} {start}: {total:,} tokens",
            f"device  {processes} x {describe_device(accelerator.device)}, {precision}",
            f"run     {config.run_folder}",
            *([f"hub     {config.hub.hub_model_id}"] if config.hub.push_to_hub else []),
        ]
    )
