"""The model: configuration, network, loss and presets. Depends only on torch and transformers, loaded on first use."""

from typing import TYPE_CHECKING, Any

from modeling.presets import PRESETS, Preset, flops_per_token, parameter_count

if TYPE_CHECKING:
    from modeling.gpt import GPTConfig, GPTModel
else:

    def __getattr__(name: str) -> Any:
        if name == "GPTConfig":
            from modeling.gpt import GPTConfig as found
        elif name in ("GPTModel", "GPTForCausalLM"):
            from modeling.gpt import GPTModel as found
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return found


__all__ = ["PRESETS", "GPTConfig", "GPTForCausalLM", "GPTModel", "Preset", "flops_per_token", "parameter_count"]
