"""GPT-2 (Radford et al. 2019, section 2.3) and GPT-3 (Brown et al. 2020, section 2.1) without sparse attention.

Shapes: B sequences, T tokens, C = n_embd channels, H = n_head heads of D = C / H channels, V = vocab_size.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, GPT2Config, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from modeling.arguments import GENERATE_ARGUMENTS, argument_names, is_paged, refuse_unknown_arguments
from modeling.loss import IGNORE_INDEX, LossKernel, linear_cross_entropy, token_cross_entropy


class GPTConfig(GPT2Config):
    """Configuration of `GPTModel`: `transformers.GPT2Config` with dropout 0 by default. Loads any `gpt2` configuration,
    and is saved as one for `GPT2LMHeadModel`.

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
        # Cross-attention is for encoder-decoder models; attention kernels accumulate in float32 anyway.
        for field in ("add_cross_attention", "reorder_and_upcast_attn"):
            if getattr(self, field):
                raise ValueError(f"{field}=True is not supported by GPTModel; use transformers' GPT2LMHeadModel")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `GPT2Config`; raises `ValueError` for a configuration of another architecture."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type={model_type!r}: GPTModel loads checkpoints of model_type 'gpt2' only.")
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `config.json` as GPT-2's, so that every program that reads GPT-2 can load the model."""
        self.architectures = ["GPT2LMHeadModel"]
        self.n_ctx = self.n_positions  # llama.cpp's converter reads this name
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights: `[B, H, T, D]` in, `[B, T, H, D]` and weights `[B, H, T, S]` out."""
    if attention_mask is None:
        scores = query @ key.transpose(-1, -2) * scaling
    else:
        # One fused operation: half the time of `scaled_dot_product_attention` on a CPU for short sequences.
        mask = attention_mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        mask = mask.expand(*query.shape[:-1], -1).flatten(0, 1)
        scores = torch.baddbmm(mask, query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2), alpha=scaling)
        scores = scores.unflatten(0, query.shape[:2])
    weights = scores.softmax(dim=-1).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class Projection(Conv1D):
    """`x @ weight + bias`, `[..., in]` to `[..., out]`, with GPT-2's weight `[in, out]`.

    It draws as many random numbers as an `nn.Linear`: a seed stands for the weights that it stood for with those.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = inputs, outputs
        linear = nn.Linear(inputs, outputs)
        self.weight, self.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias


class GPTAttention(nn.Module):
    """Causal multi-head self-attention with the kernel that `attn_implementation` names."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True  # read by the attention kernels
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)
        self.c_proj.adds_to_residual = True  # type: ignore[assignment]  # `_init_weights` reads it
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, attention_mask: Any = None, cache: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, C]` in; `[B, T, C]` and, from the eager kernel, the weights `[B, H, T, S]` out."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(x.shape[-1], dim=-1))
        if cache is not None:
            paged = {"kwargs": kwargs} if is_paged(cache) else {}
            key, value = cache.update(key, value, self.layer_idx, **paged)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attn_pdrop if self.training else 0.0
        y, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        y = self.c_proj(y.reshape(*x.shape).contiguous())
        return self.resid_dropout(y), weights


class GPTMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Projection(config.n_embd, inner)
        # GPT-2 calls the tanh approximation gelu_new; torch has the same function in one kernel.
        self.act = ACT2FN[config.activation_function.replace("gelu_new", "gelu_pytorch_tanh")]
        self.c_proj = Projection(inner, config.n_embd)
        self.c_proj.adds_to_residual = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class GPTBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block; gradient checkpointing keeps only its input."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPTMLP(config)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), **kwargs)[0]
        return x + self.mlp(self.ln_2(x))


class GPTPreTrainedModel(PreTrainedModel):
    config: GPTConfig
    config_class = GPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": GPTBlock,
        "attentions": OutputRecorder(GPTAttention, layer_name=".attn", index=1),
    }
    # The first GPT-2 checkpoints have causal masks as buffers.
    _keys_to_ignore_on_load_unexpected = ["attn.bias", "attn.masked_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws from Normal(0, 0.02), divided by sqrt(2 n_layer) for projections that add to the residual stream, of
        which there are 2 n_layer (GPT-2, section 2.3)."""
        super()._init_weights(module)
        if not isinstance(module, Projection):
            return
        stds = [self.config.initializer_range]
        if hasattr(module, "adds_to_residual"):
            stds.append(stds[0] / math.sqrt(2 * self.config.n_layer))
        for std in stds:  # drawn `[out, in]`, and again, as for `nn.Linear`: a seed stands for the same weights
            drawn = module.weight.new_empty(module.nf, module.nx).normal_(0, std)
        init.copy_(module.weight, drawn.T)
        init.zeros_(module.bias)


class GPTBackbone(GPTPreTrainedModel):
    """Embeddings, blocks and the final norm, without the head."""

    _input_embed_layer = "wte"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPTBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns the hidden states `[B, T, C]` after the final norm. Arguments as in `GPTModel.forward`."""
        packed = position_ids is not None and attention_mask is None and cache is None
        refuse_unknown_arguments(self, _BACKBONE_ARGUMENTS, cache, kwargs, packed=packed)
        for name in ("output_attentions", "output_hidden_states"):  # `capture_outputs` acts on them
            kwargs.pop(name, None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids)
        length = inputs_embeds.shape[1]
        longest = kwargs.get("max_length_q", length) if packed else length
        if longest > self.config.n_positions:
            raise ValueError(f"{longest} tokens exceed n_positions={self.config.n_positions}; truncate the input.")
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("cache= does not work with gradient checkpointing, which would write to it twice")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        positions = position_ids
        if positions is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            positions = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)
        x = inputs_embeds + self.wpe(positions)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        x = self.drop(x)

        within = _within_sequences(position_ids.expand(len(x), -1)) if packed and position_ids is not None else None
        past = None if is_paged(cache) else cache
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache=past, and_mask_function=within)
        for block in self.h:
            x = block(x, attention_mask=mask, cache=cache, position_ids=positions, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), cache=cache if use_cache else None)


def _within_sequences(position_ids: Tensor) -> Callable[..., Tensor]:
    """Returns the mask of sequences packed into rows `[B, T]`; a sequence starts where positions do not increase by 1.

    transformers would detect them too, but with a synchronization of host and device.
    """
    sequence = F.pad(position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(dim=-1)
    return lambda batch, head, query, key: sequence[batch, query] == sequence[batch, key]


_BACKBONE_ARGUMENTS = argument_names(GPTBackbone.forward)


@dataclass
class GPTOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the z-loss, which `loss` includes."""

    z_loss: Tensor | None = None


class GPTModel(GPTPreTrainedModel, GenerationMixin):
    """GPT-2/GPT-3 with a language-modelling head. Parameters have the names and the layout of HF GPT-2.

    Attributes:
        loss_kernel: the compiled `nats_and_gradient`; None for the plain function.
        z_loss: weight of the squared log-normalizer of the softmax in the loss, which keeps logits from drifting (PaLM,
            arXiv:2204.02311, section 5: 1e-4).
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    loss_kernel: LossKernel | None = None
    z_loss: float = 0.0

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.transformer = GPTBackbone(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> GPTOutput:
        """Returns the logits `[B, T, V]` of the next tokens and, given labels, the loss, float32 in nats per token;
        while training with labels no logits, which would fill the memory.

        The arguments are those of transformers' `GPT2LMHeadModel.forward`, with T at most `n_positions`.

        Args:
            cache: keys and values of the preceding tokens; those of this call are added.
            kwargs: `shift_labels`, `[B, T]`, already shifted: position t holds the token after `input_ids[:, t]`; they
                take precedence over `labels`, as in transformers' losses. `num_items_in_batch`, which divides the
                summed loss instead of the number of labels (gradient accumulation). Arguments of transformers'
                decorators and of the attention kernel (`modeling.arguments`).

        Raises:
            TypeError: for an argument that nothing acts on, with the nearest known name.
            ValueError: for arguments that exclude each other.
        """
        packed = position_ids is not None and attention_mask is None and cache is None
        # Not declared: `Trainer` takes each declared name with "label" in it for an input that evaluation needs.
        shift_labels, num_items_in_batch = (kwargs.pop(name, None) for name in ("shift_labels", "num_items_in_batch"))
        by_token = kwargs.pop("by_token", False)  # of `token_losses`
        refuse_unknown_arguments(self, _MODEL_ARGUMENTS, cache, kwargs, packed=packed)
        inputs: dict[str, Any] = {"cache": cache, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs |= {"token_type_ids": token_type_ids, "position_ids": position_ids, "use_cache": use_cache}
        outputs: Any = self.transformer(input_ids, **inputs, **kwargs)
        hidden = outputs.last_hidden_state
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        loss = z_part = None
        if shift_labels is not None:
            rows, targets = hidden.flatten(0, 1), shift_labels.reshape(-1).to(hidden.device)
            head = self.lm_head.weight
            if by_token:
                loss = token_cross_entropy(rows, head, targets).view_as(shift_labels)
            else:
                loss, z_part = linear_cross_entropy(
                    rows, head, targets, num_items_in_batch, self.z_loss, self.loss_kernel
                )
        skip_logits = by_token or (self.training and loss is not None)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Called in any case: FSDP2 counts on a forward pass of every module of its units.
        logits = self.lm_head(hidden[:, slice(0, 0) if skip_logits else kept])
        return GPTOutput(
            loss=loss,
            z_loss=z_part,
            logits=None if skip_logits else logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cache=outputs.cache,
        )

    def token_losses(self, shift_labels: Tensor, **inputs: Any) -> Tensor:
        """Returns the cross entropy of each token, `[B, T]` float32 in nats, 0 where `shift_labels` are ignored: logits
        are computed only where there is a label. For evaluation, since a backward pass would keep all of them.

        Args:
            inputs: as in `forward`.
        """
        return self(**inputs, shift_labels=shift_labels, use_cache=False, by_token=True).loss

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in `GenerationMixin`, without the arguments of `generate` itself."""
        own = {name: value for name, value in kwargs.items() if name not in GENERATE_ARGUMENTS - _MODEL_ARGUMENTS}
        return super().prepare_inputs_for_generation(*args, **own)


GPTForCausalLM = GPTModel  # the name that Hugging Face gives such a class
_MODEL_ARGUMENTS = argument_names(GPTModel.forward) | {"shift_labels", "num_items_in_batch"}
