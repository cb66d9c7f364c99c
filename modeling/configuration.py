"""GPT-2's configuration, with pre-training's defaults and no field that is read and ignored."""

from typing import Any

from transformers import GPT2Config

# Fields of GPT2Config that would change the arithmetic of the network in a way that it does not implement.
_UNSUPPORTED = {
    "add_cross_attention": "cross-attention belongs to encoder-decoder models",
    "reorder_and_upcast_attn": "attention runs in fused kernels, which accumulate in float32 by themselves",
}


class GPTConfig(GPT2Config):
    """Configuration of `GPTModel`: `transformers.GPT2Config` with dropout off, as in pre-training.

    Field names are GPT-2's (`n_layer`, `n_head`, `n_embd`, `n_positions`, `vocab_size`, ...). Saved, it is an ordinary
    `gpt2` configuration that names `GPT2LMHeadModel`; any `gpt2` configuration loads.

    Raises:
        ValueError: for a size below 1, a width that the heads do not divide, and a field that is not implemented.
    """

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
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: every head needs the same width. "
                f"Choose n_head among the divisors of n_embd."
            )
        for field, reason in _UNSUPPORTED.items():
            if getattr(self, field):
                raise ValueError(
                    f"{field}=True is not supported by GPTModel ({reason}). "
                    f"Use transformers' GPT2LMHeadModel for this checkpoint."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `GPT2Config`, but a configuration of another architecture is refused (`ValueError`)."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type={model_type!r}: GPTModel loads checkpoints of model_type 'gpt2' only.")
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `config.json` as GPT-2's own, so that every client of GPT-2 can load what lies beside it."""
        self.architectures = ["GPT2LMHeadModel"]
        self.n_ctx = self.n_positions  # a second name of it, which llama.cpp's converter goes by
        super().save_pretrained(save_directory, **kwargs)
