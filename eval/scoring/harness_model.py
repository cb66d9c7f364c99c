"""`GPTModel` as the lm-evaluation-harness sees it; importing this imports the harness."""

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from modeling import GPTModel


@register_model("gpt-accelerate")
class GPTModelLM(HFLM):
    """The harness's Hugging Face model with `GPTModel` for its class, and for contexts as short as ours may be."""

    AUTO_MODEL_CLASS = GPTModel

    @property
    def max_gen_toks(self) -> int:
        """Tokens that a task may generate where it does not say; the rest of the context is for its prompt."""
        return min(256, self.max_length // 2)
