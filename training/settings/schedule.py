"""The batch size and the learning rate of a step: pure functions of the tokens and steps before it."""

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "linear", "constant", "wsd"]


@dataclass(frozen=True)
class BatchPlan:
    """The tokens of each step: `batch_tokens`, after a linear ramp if there is one (GPT-3, appendix B: from 32k tokens
    to the full value over the first 4 to 12 billion).

    A batch is a whole multiple of the first, which must divide the last: so it does not depend on the number of
    processes, and with it neither does the order of data.

    Attributes:
        batch_tokens: tokens of a step after the ramp.
        ramp_start: tokens of the first step.
        ramp_tokens: tokens over which the batch grows; 0 for no ramp.
    """

    batch_tokens: int
    ramp_start: int = 1
    ramp_tokens: int = 0

    def size(self, consumed: int) -> int:
        """Tokens of the step that begins after `consumed` tokens."""
        if consumed >= self.ramp_tokens:
            return self.batch_tokens
        increments = (self.batch_tokens - self.ramp_start) * consumed // (self.ramp_tokens * self.ramp_start)
        return self.ramp_start * (1 + increments)

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        done, consumed = self._ramp(steps, self.ramp_tokens)
        return consumed + (steps - done) * self.batch_tokens

    def steps(self, tokens: int) -> int:
        """The fewest steps that have at least `tokens` tokens."""
        done, consumed = self._ramp(tokens, min(tokens, self.ramp_tokens))
        return done + -(-max(0, tokens - consumed) // self.batch_tokens)

    def _ramp(self, steps: int, tokens: int) -> tuple[int, int]:
        """Steps and tokens once there are `steps` or `tokens` of them, within the ramp."""
        done = consumed = 0
        while done < steps and consumed < tokens:
            consumed += self.size(consumed)
            done += 1
        return done, consumed


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a fraction of its peak. All lengths are in one unit, steps or tokens.

    It rises linearly over `warmup`, the first step at `size / warmup`. Then

        cosine    half a cosine down to `min_ratio` at `decay`, constant from there (GPT-3, appendix B)
        linear    a straight line down to `min_ratio` at `decay`, constant from there
        constant  stays
        wsd       stays until the last `cooldown` of `total`, then a straight line down to `min_ratio`
                  (warmup-stable-decay: MiniCPM, arXiv:2404.06395, section 4; Hägele et al., arXiv:2405.18392)

    Attributes:
        unit: what the lengths are counted in.
        decay: where cosine and linear end, from the beginning of the run.
        total: the length of the run.
    """

    name: ScheduleName
    unit: Literal["steps", "tokens"]
    warmup: int
    decay: int
    cooldown: int
    total: int
    min_ratio: float

    def factor(self, done: int, size: int) -> float:
        """The fraction of the peak for the step that begins after `done` and is `size` long (1 in steps)."""
        if done < self.warmup:
            return min(1.0, (done + size) / self.warmup)
        if self.name == "constant":
            return 1.0
        if self.name == "wsd":
            begin, end = self.total - self.cooldown, self.total
        else:
            begin, end = self.warmup, self.decay
        if done < begin:
            return 1.0
        progress = min(1.0, (done - begin) / (end - begin)) if end > begin else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.name == "cosine" else 1 - progress
        return self.min_ratio + (1 - self.min_ratio) * falling

    def at(self, step: int, consumed: int, size: int) -> float:
        """The fraction of the peak for step number `step`, which begins after `consumed` tokens and has `size`."""
        return self.factor(step, 1) if self.unit == "steps" else self.factor(consumed, size)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: from 0.
        batch: its sequences, as the positions of the first and of the one after the last.
        tokens: consumed by the run, this step's included.
        batch_tokens: tokens in this step, over all ranks.
        learning_rate_factor: learning rate relative to the peak.
        learning_rate: AdamW's; Muon's may have another peak.
        is_skipped: whether its batch is skipped, since it made the loss diverge.
    """

    number: int
    batch: tuple[int, int]
    tokens: int
    batch_tokens: int
    learning_rate_factor: float
    learning_rate: float
    is_skipped: bool
