"""The optimizer and the learning rate's course."""

import math
from collections.abc import Iterable

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


def cosine_lr(step: int, *, steps: int, warmup: int, lr: float, min_lr: float) -> float:
    """Learning rate of a step: linear from 0 over ``warmup`` steps, then half a cosine down to ``min_lr``."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
