"""The optimizer and the learning rate's course."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW with betas 0.9 and 0.95; norms and biases do not decay."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (plain if "norm" in name or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Learning rate by step: linear up over ``warmup`` steps, then half a cosine down.

    Attributes:
        steps: optimizer steps of the whole course.
        warmup: steps until the highest rate; may be a fraction.
        lr, min_lr: learning rate at its highest and at the end.
    """

    steps: int
    lr: float
    min_lr: float = 0.0
    warmup: float = 0.0

    def __call__(self, step: int) -> float:
        """The rate of the step after so many; the first one has a rate above 0 already."""
        if step < self.warmup:
            return self.lr * min(1.0, (step + 1) / self.warmup)
        done = (step - self.warmup) / max(1.0, self.steps - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
