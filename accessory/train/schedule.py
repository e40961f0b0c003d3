"""The learning rate's course over a run; without torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

# By its name each schedule's share of the way from the lowest to the highest rate, after the warm-up: a function of how
# much of the rest is done, and how much of it the last fall takes ("wsd" alone has one), both from 0 to 1.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda done, _: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done, _: 1 - done,
    "constant": lambda *_: 1.0,
    # Warm-up, stable, decay: https://arxiv.org/abs/2404.06395, with the linear fall of https://arxiv.org/abs/2405.18392.
    "wsd": lambda done, fall: 1.0 if done <= 1 - fall else (1 - done) / fall,
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by step: linear up over ``warmup`` steps, then as ``shape`` has it.

    Attributes:
        steps: optimizer steps of the whole course.
        warmup: steps until the highest rate; may be a fraction.
        lr, min_lr: learning rate at its highest and at the end.
        shape: a name of SCHEDULES.
        decay: the last steps, over which "wsd" falls; None: a tenth of all.
    """

    steps: int
    lr: float
    min_lr: float = 0.0
    warmup: float = 0.0
    shape: str = "cosine"
    decay: int | None = None

    def __call__(self, step: int) -> float:
        """The rate of the step after so many; the first one has a rate above 0 already."""
        if step < self.warmup:
            return self.lr * min(1.0, (step + 1) / self.warmup)
        rest = max(1.0, self.steps - self.warmup)
        done = min(1.0, (step - self.warmup) / rest)
        fall = min(1.0, (self.steps / 10 if self.decay is None else self.decay) / rest)
        return self.min_lr + (self.lr - self.min_lr) * SCHEDULES[self.shape](done, fall)
