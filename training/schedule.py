"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math


def cosine_with_warmup(step: int, *, peak: float, warmup_steps: int, max_steps: int, min_ratio: float) -> float:
    """Learning rate of step `step`, counted from 0.

    Linear over `warmup_steps`, the first step at `peak / warmup_steps`; then half a cosine from `peak` down to
    `min_ratio * peak` at `max_steps`, and constant from there (GPT-3, appendix B: to 10%).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= max_steps:
        return peak * min_ratio
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
