"""The training loop."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.model.meta import MetaModel
from accessory.train.optim import adamw, cosine_lr


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimizer steps.
        lr, min_lr: learning rate at its highest and at the end.
        warmup: steps until the highest.
        clip_grad: limit of the gradients' global norm; 0 or less: off.
    """

    steps: int
    lr: float
    min_lr: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured.

    Attributes:
        loss: cross-entropy, mean over learned tokens, natural logarithm.
        balance_loss: the load-balancing loss before its weight; 1 is even.
    """

    step: int
    loss: float
    balance_loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float


def train(model: MetaModel, batches: Iterable[tuple[Tensor, Tensor]], settings: TrainSettings) -> list[StepMetrics]:
    """Train on batches of (examples, labels), one optimizer step each, with a progress bar.

    Stops after ``settings.steps`` or when the batches end. The model is left in training mode.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the step is not taken.
    """
    model.train()
    optimizer = adamw(model.named_parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    history: list[StepMetrics] = []
    with tqdm(total=settings.steps, desc="training", unit="step", dynamic_ncols=True) as progress:
        for step, (examples, labels) in zip(range(settings.steps), batches, strict=False):
            metrics = _step(model, optimizer, examples, labels, settings, step)
            history.append(metrics)
            progress.set_postfix(
                loss=f"{metrics.loss:.3f}",
                balance=f"{metrics.balance_loss:.3f}",
                lr=f"{metrics.lr:.1e}",
                tokens_per_s=f"{metrics.tokens_per_s:,.0f}",
                refresh=False,
            )
            progress.update()
    return history


def _step(
    model: MetaModel,
    optimizer: torch.optim.Optimizer,
    examples: Tensor,
    labels: Tensor,
    settings: TrainSettings,
    step: int,
) -> StepMetrics:
    start = time.perf_counter()
    lr = cosine_lr(step, steps=settings.steps, warmup=settings.warmup, lr=settings.lr, min_lr=settings.min_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, extras = model(examples, labels)
    total = loss + sum(value * weight for value, weight in extras.values())
    total.backward()
    limit = settings.clip_grad if settings.clip_grad > 0 else float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    if not (torch.isfinite(total) and torch.isfinite(grad_norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss.item()} with gradient norm {grad_norm.item()} is not finite; "
            "lower the learning rate or clip the gradients harder"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepMetrics(
        step=step,
        loss=loss.item(),
        balance_loss=extras["load_balancing"][0].item(),
        lr=lr,
        grad_norm=grad_norm.item(),
        tokens_per_s=examples.numel() / (time.perf_counter() - start),
    )
