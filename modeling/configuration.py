"""GPT-2's configuration with defaults for pre-training; unsupported fields are refused."""

import os
from typing import Any

from transformers import GPT2Config

# Fields of GPT2Config that GPTModel does not implement.
_UNSUPPORTED = {
    "add_cross_attention": "cross-attention belongs to encoder-decoder models",
    "reorder_and_upcast_attn": "attention kernels accumulate in float32 already",
}


class GPTConfig(GPT2Config):
    """Configuration of `GPTModel`: `transformers.GPT2Config` without dropout. It loads any `gpt2` configuration, and is
    saved as one that names `GPT2LMHeadModel`.

    Raises:
        ValueError: for a size below 1, an `n_embd` that is not a multiple of `n_head`, and an unsupported field.
    """

    keys_to_ignore_at_inference = ["cache", "z_loss"]  # outputs that are no predictions, for `Trainer`
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for field in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}={value!r} must be a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; choose an n_head that divides it"
            )
        for field, reason in _UNSUPPORTED.items():
            if getattr(self, field):
                raise ValueError(
                    f"{field}=True is not supported by GPTModel ({reason}); use transformers' GPT2LMHeadModel"
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `GPT2Config`; raises `ValueError` for a configuration of another architecture."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type={model_type!r}: GPTModel loads checkpoints of model_type 'gpt2' only.")
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `config.json` as GPT-2's, so that every program that reads GPT-2 loads the model."""
        self.architectures = ["GPT2LMHeadModel"]
        self.n_ctx = self.n_positions  # llama.cpp's converter reads this name
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
