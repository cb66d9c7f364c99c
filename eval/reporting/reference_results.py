"""What GPT-2 and GPT-3 of the published sizes score."""

from dataclasses import dataclass

# Models are called of the same size up to this factor: GPT-2 has 124M where GPT-3 has 125M, and 1558M next to 1.3B.
_SAME_SIZE = 1.25


@dataclass(frozen=True)
class Published:
    """A published model and its scores, None where nobody has published one.

    Attributes:
        hellaswag_completion: acc_norm by the mean loss of a token. GPT-2: measured by build-nanogpt and llm.c; GPT-3:
            Brown et al. 2020 (arXiv:2005.14165), table H.1, zero-shot.
        hellaswag_lm_eval: acc_norm of EleutherAI's harness.
        fineweb_edu_loss: on the validation shard of FineWeb-Edu's sample-10BT, measured by build-nanogpt, in nats.
    """

    name: str
    parameters: float
    hellaswag_completion: float
    hellaswag_lm_eval: float | None = None
    fineweb_edu_loss: float | None = None


PUBLISHED = (
    Published("GPT-2 124M", 124e6, 0.2955, 0.3114, 3.2924),
    Published("GPT-2 350M", 355e6, 0.3752),
    Published("GPT-2 774M", 774e6, 0.4320),
    Published("GPT-2 1558M", 1558e6, 0.4889, 0.5089),
    Published("GPT-3 125M", 125e6, 0.337),
    Published("GPT-3 350M", 356e6, 0.436),
    Published("GPT-3 760M", 760e6, 0.510),
    Published("GPT-3 1.3B", 1.3e9, 0.547),
)


def of_the_same_size(parameters: float | None) -> list[Published]:
    """The published models that a model of so many parameters is compared with; none if it is of no published size."""
    if parameters is None:
        return []
    return [p for p in PUBLISHED if 1 / _SAME_SIZE < parameters / p.parameters < _SAME_SIZE]
