"""Published scores of GPT-2, GPT-3 and build-nanogpt's run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_SAME_SIZE = 1.25  # largest ratio of parameters: GPT-2 has 124M and 1558M where GPT-3 has 125M and 1.3B

# Brown et al. 2020 (arXiv:2005.14165v4), table H.1, zero-shot, of the models Small, Med, Large and XL, by the harness's
# task and its nearest metric, in its units (eval/tasks/gpt3_zero_shot.yaml has the rules). Compared with two copies of
# the paper's text on GitHub: standardgalactic/zetetics, 2005.14165.txt, and finnoh/ws_genai_eb, 2005.14165.md.
_GPT3_ZERO_SHOT = {
    ("hellaswag", "acc_norm"): (0.337, 0.436, 0.510, 0.547),
    ("lambada_openai", "acc"): (0.427, 0.543, 0.604, 0.636),
    ("lambada_openai", "perplexity"): (18.6, 9.09, 6.53, 5.44),
    ("nq_open", "exact_match"): (0.0064, 0.0175, 0.0271, 0.0440),
    ("triviaqa", "exact_match"): (0.0415, 0.0761, 0.140, 0.197),
    ("webqs", "exact_match"): (0.0177, 0.0320, 0.0433, 0.0463),
    ("wmt14-en-fr", "bleu"): (2.44, 2.75, 3.54, 2.82),  # BLEU-sb, SacreBLEU's
    ("wmt14-fr-en", "bleu"): (2.29, 2.99, 3.90, 3.60),
    ("wmt16-de-en", "bleu"): (2.39, 3.27, 3.85, 4.04),
    ("wmt16-en-de", "bleu"): (2.09, 2.65, 2.75, 2.92),
    ("wmt16-en-ro", "bleu"): (2.61, 3.11, 3.07, 3.09),
    ("wmt16-ro-en", "bleu"): (2.39, 3.08, 3.49, 3.56),
    ("wsc273", "acc"): (0.663, 0.729, 0.747, 0.769),
    ("winogrande", "acc"): (0.520, 0.521, 0.574, 0.587),
    ("piqa", "acc_norm"): (0.646, 0.702, 0.729, 0.751),
    ("arc_challenge", "acc_mutual_info"): (0.266, 0.295, 0.318, 0.355),
    ("arc_easy", "acc_mutual_info"): (0.436, 0.465, 0.530, 0.538),
    ("openbookqa", "acc_mutual_info"): (0.356, 0.432, 0.452, 0.468),
    ("race", "acc_mutual_info"): (0.352, 0.379, 0.401, 0.409),  # RACE-h
    ("squadv2", "exact"): (22.6, 32.8, 33.9, 43.1),
    ("squadv2", "f1"): (28.3, 40.2, 41.4, 50.3),
    ("coqa", "f1"): (0.345, 0.550, 0.618, 0.653),
    ("drop", "f1"): (0.0940, 0.136, 0.144, 0.164),
    ("boolq", "acc"): (0.497, 0.603, 0.589, 0.624),
    ("cb", "acc"): (0.0, 0.321, 0.0893, 0.196),
    ("cb", "f1"): (0.0, 0.293, 0.114, 0.174),
    ("copa", "acc_norm"): (0.660, 0.680, 0.730, 0.770),
    ("sglue_rte", "acc"): (0.477, 0.498, 0.484, 0.560),
    ("wic", "acc"): (0.0, 0.0, 0.0, 0.0),
    ("wsc", "acc"): (0.596, 0.567, 0.654, 0.615),
    ("record", "em"): (0.708, 0.785, 0.821, 0.841),
    ("record", "f1"): (0.719, 0.792, 0.828, 0.852),
    ("anli_r1", "acc"): (0.334, 0.342, 0.334, 0.334),
    ("anli_r2", "acc"): (0.332, 0.319, 0.333, 0.333),
    ("anli_r3", "acc"): (0.336, 0.340, 0.338, 0.334),
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
