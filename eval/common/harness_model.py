"""`GPTModel` as a model of the lm-evaluation-harness; importing this imports the harness."""

from collections.abc import Callable
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from modeling import GPTModel


@register_model("gpt-accelerate")
class GPTModelLM(HFLM):
    """The harness's Hugging Face model with class `GPTModel`."""

    AUTO_MODEL_CLASS = GPTModel

    def __init__(self, *args: Any, add_bos_token: bool = False, **options: Any) -> None:
        """As in `HFLM`; by default the tokenizer's template adds no tokens, as in training."""
        super().__init__(*args, add_bos_token=add_bos_token, **options)

    @property
    def prefix_token_id(self) -> int:
        """Context of a text without one: the end-of-text token, which starts every document."""
        start = self.model.config.bos_token_id  # of this project's models; the tokenizer's may be another token
        known = self.custom_prefix_token_id is None and start in self.tokenizer.all_special_ids
        return start if known else super().prefix_token_id

    @property
    def max_gen_toks(self) -> int:
        """Default number of tokens to generate: at most half of a short context, to leave room for the prompt."""
        return min(256, self.max_length // 2)


class StoppableLM(GPTModelLM):
    """`GPTModelLM` that checks between batches whether to stop. Ranks have different numbers of batches: one that is
    done keeps checking until all ranks are.

    Args:
        check_stop: collective; takes whether this rank is done, returns whether all are, and raises to stop.
    """

    def __init__(self, check_stop: Callable[[bool], bool], **options: Any) -> None:
        self.check_stop = check_stop
        super().__init__(**options)

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        self.check_stop(False)
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        self.check_stop(False)
        return super()._model_generate(*args, **kwargs)

    def all_gather(self, tensor: Any) -> Any:
        self._wait()
        return super().all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        self._wait()
        return super().gather_object(obj, dst)

    def barrier(self) -> None:
        self._wait()
        super().barrier()

    def _wait(self) -> None:
        while not self.check_stop(True):
            pass
