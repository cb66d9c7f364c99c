"""Published scores of GPT-2, GPT-3 and build-nanogpt's run."""

from dataclasses import dataclass

_SAME_SIZE = 1.25  # largest ratio of parameters: GPT-2 has 124M and 1558M where GPT-3 has 125M and 1.3B


@dataclass(frozen=True)
class ReferenceResult:
    """A published model and its scores; None if not published.

    Attributes:
        hellaswag_completion: acc_norm by the mean loss of a token. GPT-2: measured by build-nanogpt and llm.c; GPT-3:
            Brown et al. 2020 (arXiv:2005.14165), table H.1, zero-shot.
        hellaswag_lm_eval: acc_norm of EleutherAI's harness.
        fineweb_edu_loss: in nats, on the validation shard of FineWeb-Edu's sample-10BT, measured by build-nanogpt.

    build-nanogpt's own run of 40B tokens is that in its README, with the lowest loss and the highest accuracy.
    """

    name: str
    parameters: float
    hellaswag_completion: float
    hellaswag_lm_eval: float | None = None
    fineweb_edu_loss: float | None = None


REFERENCE_RESULTS = (
    ReferenceResult("GPT-2 124M", 124e6, 0.2955, 0.3114, 3.2924),
    ReferenceResult("GPT-2 350M", 355e6, 0.3752),
    ReferenceResult("GPT-2 774M", 774e6, 0.4320),
    ReferenceResult("GPT-2 1558M", 1558e6, 0.4889, 0.5089),
    ReferenceResult("build-nanogpt 124M", 124e6, 0.3337, None, 2.9478),
    ReferenceResult("GPT-3 125M", 125e6, 0.337),
    ReferenceResult("GPT-3 350M", 356e6, 0.436),
    ReferenceResult("GPT-3 760M", 760e6, 0.510),
    ReferenceResult("GPT-3 1.3B", 1.3e9, 0.547),
)


def of_the_same_size(parameters: float | None) -> list[ReferenceResult]:
    """Returns the published models of about this number of parameters."""
    sizes = REFERENCE_RESULTS if parameters else ()
    return [one for one in sizes if 1 / _SAME_SIZE < (parameters or 0) / one.parameters < _SAME_SIZE]
