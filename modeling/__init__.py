"""The model: configuration, network, loss and presets. Needs only torch and transformers."""

from modeling.configuration import GPTConfig
from modeling.network import GPTModel
from modeling.presets import PRESETS, Preset, flops_per_token, parameter_count

__all__ = ["PRESETS", "GPTConfig", "GPTModel", "Preset", "flops_per_token", "parameter_count"]
