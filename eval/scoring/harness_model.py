"""`GPTModel` as a model of the lm-evaluation-harness; importing this imports the harness."""

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from modeling import GPTModel


@register_model("gpt-accelerate")
class GPTModelLM(HFLM):
    """The harness's Hugging Face model with class `GPTModel`."""

    AUTO_MODEL_CLASS = GPTModel

    @property
    def max_gen_toks(self) -> int:
        """Default of generated tokens: at most half of a short context, which leaves room for the prompt."""
        return min(256, self.max_length // 2)
