"""Published scores of GPT-2, GPT-3 and build-nanogpt's run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_SAME_SIZE = 1.25  # largest ratio of parameters: GPT-2 has 124M and 1558M where GPT-3 has 125M and 1.3B

# Brown et al. 2020 (arXiv:2005.14165v4), table H.1, zero-shot, of the models Small, Med, Large and XL, by the harness's
# task and its nearest metric, in its units (eval/tasks/gpt3_zero_shot.yaml has the rules); only tasks on which such
# models beat chance. Compared with two copies of the paper's text on GitHub: standardgalactic/zetetics,
# 2005.14165.txt, and finnoh/ws_genai_eb, 2005.14165.md.
_GPT3_ZERO_SHOT = {
    ("hellaswag", "acc_norm"): (0.337, 0.436, 0.510, 0.547),
    ("lambada_openai", "acc"): (0.427, 0.543, 0.604, 0.636),
    ("lambada_openai", "perplexity"): (18.6, 9.09, 6.53, 5.44),
    ("triviaqa", "exact_match"): (0.0415, 0.0761, 0.140, 0.197),
    ("wsc273", "acc"): (0.663, 0.729, 0.747, 0.769),
    ("winogrande", "acc"): (0.520, 0.521, 0.574, 0.587),
    ("piqa", "acc_norm"): (0.646, 0.702, 0.729, 0.751),
    ("arc_challenge", "acc_mutual_info"): (0.266, 0.295, 0.318, 0.355),
    ("arc_easy", "acc_mutual_info"): (0.436, 0.465, 0.530, 0.538),
    ("openbookqa", "acc_mutual_info"): (0.356, 0.432, 0.452, 0.468),
    ("race", "acc_mutual_info"): (0.352, 0.379, 0.401, 0.409),  # RACE-h
    ("boolq", "acc"): (0.497, 0.603, 0.589, 0.624),
    ("copa", "acc_norm"): (0.660, 0.680, 0.730, 0.770),
    ("sglue_rte", "acc"): (0.477, 0.498, 0.484, 0.560),
}


@dataclass(frozen=True)
class ReferenceResult:
    """A published model and its scores; None if not published.

    Attributes:
        hellaswag_completion: acc_norm by the mean loss of a token. GPT-2: measured by build-nanogpt and llm.c.
        hellaswag_lm_eval: acc_norm of EleutherAI's harness.
        fineweb_edu_loss: in nats, on the validation shard of FineWeb-Edu's sample-10BT, measured by build-nanogpt.
        harness: scores by task and metric of EleutherAI's harness.

    build-nanogpt's own run of 40B tokens is that in its README, with the lowest loss and the highest accuracy.
    """

    name: str
    parameters: float
    hellaswag_completion: float
    hellaswag_lm_eval: float | None = None
    fineweb_edu_loss: float | None = None
    harness: Mapping[tuple[str, str], float] = field(default_factory=dict, hash=False)


def _gpt3(name: str, parameters: float, column: int) -> ReferenceResult:
    scores = {metric: values[column] for metric, values in _GPT3_ZERO_SHOT.items()}
    return ReferenceResult(name, parameters, scores["hellaswag", "acc_norm"], harness=scores)


REFERENCE_RESULTS = (
    ReferenceResult("GPT-2 124M", 124e6, 0.2955, 0.3114, 3.2924),
    ReferenceResult("GPT-2 350M", 355e6, 0.3752),
    ReferenceResult("GPT-2 774M", 774e6, 0.4320),
    ReferenceResult("GPT-2 1558M", 1558e6, 0.4889, 0.5089),
    ReferenceResult("build-nanogpt 124M", 124e6, 0.3337, None, 2.9478),
    _gpt3("GPT-3 125M", 125e6, 0),
    _gpt3("GPT-3 350M", 356e6, 1),
    _gpt3("GPT-3 760M", 760e6, 2),
    _gpt3("GPT-3 1.3B", 1.3e9, 3),
)


def of_the_same_size(parameters: float | None) -> list[ReferenceResult]:
    """Returns the published models of about this number of parameters."""
    sizes = REFERENCE_RESULTS if parameters else ()
    return [one for one in sizes if 1 / _SAME_SIZE < (parameters or 0) / one.parameters < _SAME_SIZE]
