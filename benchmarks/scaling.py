"""Memory, Accelerate config and days of training for each GPT-3 preset, written to docs/scaling.md.

python -m benchmarks.scaling > docs/scaling.md

An estimate, not a measurement: throughput is an assumed share of the GPU's peak (`_MFU`).
"""

from dataclasses import dataclass
from itertools import product

from data_prep.common.command_line import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # before torch is loaded

from data_prep.common.command_line import ArgumentParser, run
from modeling import PRESETS, GPTConfig, Preset, flops_per_token, parameter_count

_VOCAB_SIZE = 50257
_TOKENS = 300e9  # GPT-3, section 2.2
_MFU = 0.4
_CHUNK_BYTES = 4096 * 50304 * (2 + 4 + 2)  # logits of a chunk in bf16, probabilities in float32, gradient in bf16
_RESERVED = 4 * 2**30  # CUDA's context, communication, fragmentation


@dataclass(frozen=True)
class GPU:
    """A GPU with its memory in bytes and its dense peak in bf16 in FLOP/s."""

    name: str
    memory: int
    peak: float


H100 = GPU("H100 (80 GB)", 80 * 10**9, 989e12)


def activation_bytes(config: GPTConfig, checkpointing: str) -> int:
    """Returns the bytes that the backward pass needs for one sequence in bf16.

    Without recomputation 32 T C per layer: Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count
    34 T C + 5 H T^2, less 2 T C for the masks of dropout and all of H T^2, as attention is fused. With full
    checkpointing the input of each layer, and one layer in full.
    """
    channels = config.n_positions * config.n_embd
    layer = 32 * channels
    return config.n_layer * layer if checkpointing == "none" else config.n_layer * 2 * channels + layer


def state_bytes(parameters: int, shards: int) -> int:
    """Returns the bytes per GPU of float32 weights, gradients and AdamW's two moments on `shards` GPUs."""
    return 16 * parameters // shards


@dataclass(frozen=True)
class Plan:
    """A way to train a preset; `state` and `activations` are bytes per GPU."""

    gpus: int
    sharded: bool
    checkpointing: str
    micro_batch: int
    state: int
    activations: int
    days: float

    @property
    def accelerate_config(self) -> str:
        names = {(False, 1): "ddp", (True, 1): "fsdp2", (False, 2): "multi_node", (True, 2): "fsdp2_multi_node"}
        return names[self.sharded, 1 if self.gpus <= 8 else 2] + ".yaml"


def make_plan(preset: Preset, gpu: GPU = H100) -> Plan:
    """Returns the plan with the fewest GPUs, in machines of 8, that fits and takes at most 35 days for 300B tokens.

    Prefers data parallelism to sharding, and keeping activations to recomputing them. Raises `ValueError` if no plan
    fits.
    """
    config = config_of(preset)
    parameters = parameter_count(config)
    seconds = _TOKENS * flops_per_token(config, preset.n_positions) / (_MFU * gpu.peak)  # on one GPU
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        sequences, left_over = divmod(preset.batch_tokens, preset.n_positions * gpus)
        if left_over or seconds / gpus > 35 * 86400:
            continue
        for sharded, checkpointing in product((False, True), ("none", "full")):
            # bf16 weights on a GPU: all of them, or if sharded those of a layer and of the prefetched next one.
            in_use = 2 * parameters // (config.n_layer // 2 if sharded else 1)
            state = state_bytes(parameters, gpus if sharded else 1) + in_use
            one = activation_bytes(config, checkpointing)
            room = (gpu.memory - _RESERVED - _CHUNK_BYTES - state) // one
            sizes = [size for size in range(1, sequences + 1) if sequences % size == 0 and size <= room]
            if sizes:
                kept = sizes[-1] * one + _CHUNK_BYTES
                return Plan(gpus, sharded, checkpointing, sizes[-1], state, kept, seconds / gpus / 86400)
    raise ValueError(f"no plan of up to 1,024 {gpu.name} for {preset}")


def config_of(preset: Preset) -> GPTConfig:
    """Returns the configuration of a preset with GPT-2's vocabulary."""
    sizes = {name: getattr(preset, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
    return GPTConfig(vocab_size=_VOCAB_SIZE, **sizes)


def document() -> str:
    """Returns the text of docs/scaling.md."""
    lines = [
        "# What each GPT-3 preset takes",
        "",
        f"Computed by `python -m benchmarks.scaling` from the presets: 300B tokens on {H100.name} GPUs at {_MFU:.0%} "
        f"of their peak of {H100.peak / 1e12:.0f} TFLOP/s, an assumption (llm.c and nanoGPT publish 29% to 41% for "
        "124M). State: float32 weights and gradients, AdamW's moments and the bf16 weights in use. Activations: those "
        "of a micro-batch and a chunk of logits. None of it has been run on GPUs by this project yet.",
        "",
        "| preset | parameters | GPUs | Accelerate config | gradient checkpointing | tokens a step = GPUs x "
        "accumulated x micro-batch x 2,048 | state per GPU | activations per GPU | days |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        if not name.startswith("gpt3"):
            continue
        plan = make_plan(preset)
        accumulated = preset.batch_tokens // (plan.gpus * plan.micro_batch * preset.n_positions)
        lines.append(
            f"| {name} | {parameter_count(config_of(preset)) / 1e9:.2f}B | {plan.gpus} | {plan.accelerate_config} | "
            f"{plan.checkpointing} | {preset.batch_tokens:,} = {plan.gpus} x {accumulated} x {plan.micro_batch} x "
            f"{preset.n_positions:,} | {plan.state / 2**30:.1f} GiB | {plan.activations / 2**30:.1f} GiB | "
            f"{plan.days:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    ArgumentParser("python -m benchmarks.scaling", __doc__).parse_args()
    print(document())


if __name__ == "__main__":
    run(main)
