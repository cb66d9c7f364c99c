"""The parts of `python -m benchmarks.gpu_trial` that time steps and kernels in their own process."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.trial_runs import Trial, data

_LLMC_TOKENS_PER_SECOND = 475_000  # llm.c, 124M on one H100 (github.com/karpathy/llm.c, discussion 481)
_GOAL_OVER_BUILD_NANOGPT = 1.3


def versions(trial: Trial) -> None:
    """Reports installed versions, and which attention kernels work and how fast."""
    from importlib.metadata import version

    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from training.engine.distributed import describe_device

    names = ("torch", "transformers", "accelerate", "numpy")
    trial.report("versions", ", ".join([f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]))
    trial.report("device", describe_device(trial.device))
    if trial.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        trial.report("memory, CUDA", f"{properties.total_memory / 2**30:.1f} GiB, {torch.version.cuda}")
    shape, dtype = ((64, 12, 1024, 64), torch.bfloat16) if trial.on_gpu else ((2, 2, 64, 16), torch.float32)
    q, k, v = (torch.randn(shape, device=trial.device, dtype=dtype, requires_grad=True) for _ in range(3))
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True))
    trial.report(f"attention of {list(shape)}", chosen.name)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                seconds = timed(trial, lambda: scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward())
            trial.report(f"{backend.name}, forward and backward", f"{seconds * 1e3:.2f} ms")
        except RuntimeError as error:
            trial.report(f"{backend.name}", f"not available: {str(error).splitlines()[0][:80]}")


def timed(trial: Trial, work: Callable[[], Any], repeats: int = 10) -> float:
    """Returns the median of the seconds that `work` takes, after two warm-up runs."""
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        work()
        if trial.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def speed(trial: Trial) -> None:
    """Reports tokens per second of training, beside build-nanogpt's and transformers' `Trainer`."""
    from benchmarks.interleaved import run_interleaved, spread
    from benchmarks.training_step import SIZES, step_workload
    from modeling import flops_per_token
    from training.engine.distributed import describe_device
    from training.monitoring.metrics import peak_flops

    if trial.on_gpu:
        size, rounds, steps, suffix = replace(SIZES["gpt2-124m"], micro_batch=64, accumulation=1), 5, 5, ", compiled"
    else:
        size, rounds, steps, suffix = replace(SIZES["quickstart"], micro_batch=2), 1, 1, ""
    names = [f"gpt-accelerate{suffix}", f"build-nanogpt{suffix}", f"Trainer{suffix}"]
    precision = "bf16" if trial.on_gpu else "no"
    setups = {name: partial(step_workload, name, size, precision, steps) for name in names}
    halves = replace(size, micro_batch=size.micro_batch // 2, accumulation=2)  # Trainer needs more memory
    setups[names[2]] = partial(step_workload, names[2], halves, precision, steps)
    peak = peak_flops(describe_device(trial.device), precision)
    for other, goal in ((names[1], _GOAL_OVER_BUILD_NANOGPT), (names[2], 1.0)):  # separately, as either may fail
        results = run_interleaved({name: setups[name] for name in (names[0], other)}, rounds)
        speeds = {name: [steps * size.tokens / one for one in seconds] for name, (seconds, _) in results.items()}
        for name, own in speeds.items():
            flops = flops_per_token(size.config, size.length) * statistics.median(own)
            mfu = "" if peak is None else f", MFU {flops / peak:.1%}"
            trial.report(name, f"{spread(own, ',.0f')} tokens/s{mfu}, {results[name][1] / 2**30:.1f} GiB")
        ratios = [a / b for a, b in zip(speeds[names[0]], speeds[other], strict=True)]
        missed = "" if statistics.median(ratios) >= goal else f", below the goal of {goal}"
        trial.report(f"speed / {other}", f"{spread(ratios, '.2f')}{missed}")
    if trial.on_gpu:
        own = statistics.median(speeds[names[0]])
        trial.report(f"speed / llm.c's {_LLMC_TOKENS_PER_SECOND:,}", f"{own / _LLMC_TOKENS_PER_SECOND:.2f}")


_KINDS = {
    "fused by inductor": ("triton", "cpp_fused"),  # first, as their names contain those of the fused operations
    "attention": ("flash", "attention", "fmha", "cudnn"),
    "matrix products": ("gemm", "cutlass", "nvjet", "addmm", "aten::mm", "bmm", "sm90_xmma", "cublas"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "copies": ("memcpy", "memset", "copy"),
}


def profile(trial: Trial) -> None:
    """Reports the share of each kind of kernel in the time of a step, and the compiled graphs."""
    from torch._dynamo.utils import counters
    from torch.profiler import ProfilerActivity

    from benchmarks.training_step import SIZES, engine

    size = replace(SIZES["gpt2-124m"], micro_batch=64) if trial.on_gpu else replace(SIZES["quickstart"], micro_batch=2)
    steps = engine(size, "bf16" if trial.on_gpu else "no", compiled=trial.on_gpu)
    steps(3)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * trial.on_gpu
    with torch.profiler.profile(activities=activities) as recorded:
        steps(3)
    spent = dict.fromkeys([*_KINDS, "other"], 0.0)
    for one in recorded.key_averages():
        if one.is_user_annotation or (one.device_type == torch.autograd.DeviceType.CUDA) != trial.on_gpu:
            continue  # annotations count the time of kernels again
        name = one.key.lower()
        kind = next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "other")
        spent[kind] += one.self_device_time_total if trial.on_gpu else one.self_cpu_time_total
    table = recorded.key_averages().table(sort_by=f"self_{trial.device.type}_time_total", row_limit=60)
    (trial.out / "profile.txt").write_text(table + "\n", encoding="utf-8")
    trial.report(
        "graphs, graph breaks", f"{counters['stats']['unique_graphs']}, {sum(counters['graph_break'].values())}"
    )
    total = sum(spent.values())
    for kind, microseconds in spent.items():
        trial.report(kind, f"{microseconds / total:.1%}" if total else "no time recorded")


def _scattering(logits: Tensor, targets: Tensor, valid: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the loss as version 0.2 did, with a scatter into a float32 buffer."""
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    log_normalizer = logits.amax(dim=-1, keepdim=True).float() - probs.amax(dim=-1, keepdim=True).log()
    nats = ((log_normalizer - logits.gather(1, targets).float()) * valid).sum()
    gradient = logits.copy_(probs.scatter_add_(1, targets, -torch.ones_like(probs[:, :1])))
    return nats, torch.zeros_like(nats), gradient


def loss(trial: Trial) -> None:
    """Reports time and memory of the loss, forward and backward, by size of chunk and kernel."""
    import modeling.loss as module

    n, c, v = (65536, 768, 50257) if trial.on_gpu else (256, 32, 500)
    hidden = torch.randn(n, c, device=trial.device, dtype=torch.bfloat16 if trial.on_gpu else None, requires_grad=True)
    weight = nn.Parameter(torch.randn(v, c, device=trial.device) * 0.02)
    labels = torch.randint(v, (n,), device=trial.device)
    kernels = {"": module.nats_and_gradient, ", scattered": _scattering}

    def forward_backward(kernel: module.LossKernel) -> None:
        with torch.autocast(trial.device.type, torch.bfloat16, enabled=trial.on_gpu):
            module.linear_cross_entropy(hidden, weight, labels, loss_kernel=kernel)[0].backward()
        hidden.grad = weight.grad = None

    for title, kernel in kernels.items():
        kernel = torch.compile(kernel, dynamic=False) if trial.on_gpu else kernel
        for chunk in (4096, 8192, 16384, 32768) if trial.on_gpu else (64, 256):
            module.chunk_tokens = lambda device, chunk=chunk: chunk
            if trial.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(trial, lambda kernel=kernel: forward_backward(kernel))
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if trial.on_gpu else ""
            trial.report(f"loss of {n:,} tokens, chunks of {chunk:,}{title}", f"{seconds * 1e3:.2f} ms{memory}")


def evaluation(trial: Trial) -> None:
    """Reports the speed of HellaSwag and of generation with random weights."""
    from data_prep.tokenization.tokenizer import hf_tokenizer
    from eval.common.devices import make_accelerator
    from eval.common.generation import Sampling, generate
    from eval.common.models import compile_blocks
    from eval.hellaswag import HellaSwag, read_items
    from modeling import GPTConfig, GPTModel

    folder = data(trial)
    tokenizer = hf_tokenizer(folder / "tokenizer")
    items = read_items(folder.with_name("swag.jsonl"))[: 400 if trial.on_gpu else 20]
    accelerator = make_accelerator(mixed_precision="bf16" if trial.on_gpu else "no")
    sizes = {} if trial.on_gpu else {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 512}
    model = GPTModel(GPTConfig(vocab_size=257, **sizes)).eval().to(accelerator.device)
    task = HellaSwag.prepare(items, "completion", tokenizer)
    counts: list[int] = []
    sampling = Sampling(max_new_tokens=100 if trial.on_gpu else 10)
    seconds = timed(trial, lambda: counts.append(generate(model, tokenizer, "import", sampling).new_tokens), repeats=2)
    trial.report("generation, one text", f"{counts[-1] / seconds:,.0f} tokens/s")
    for compiled in (False, True)[: 1 + trial.on_gpu]:
        if compiled:
            compile_blocks(model)
        with accelerator.autocast():
            seconds = timed(trial, lambda: task.evaluate(accelerator, model), repeats=2)
        trial.report(f"HellaSwag{', compiled' if compiled else ''}", f"{len(items) / seconds:,.0f} items/s")
