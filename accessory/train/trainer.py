"""The training loop."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from accessory.model.meta import MetaModel
from accessory.parallel.state import on_all_ranks
from accessory.train.optim import adamw, cosine_lr

# The micro-batches of one rank for one step: (examples, labels), each int64 (batch, length).
MicroBatches = Sequence[tuple[Tensor, Tensor]]


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
        loss: cross-entropy, mean over the learned tokens of all ranks, natural logarithm.
        balance_loss: the load-balancing loss before its weight, mean over micro-batches; 1 is even.
        tokens_per_s: tokens of all ranks, padding included.
    """

    step: int
    loss: float
    balance_loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float


def train(model: MetaModel, steps: Iterable[MicroBatches], settings: TrainSettings) -> list[StepMetrics]:
    """Take one optimizer step for each list of micro-batches (examples, labels), with a progress bar.

    Collective over all ranks, which must get equally many micro-batches in every step. Stops after
    ``settings.steps`` or when the steps end. The model is left in training mode.

    Raises:
        FloatingPointError: loss or gradient are not finite; on every rank alike, and the step is not taken.
    """
    model.train()
    optimizer = adamw(model.named_parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    history: list[StepMetrics] = []
    silent = model.llma.state.dp_rank != 0 or model.llma.state.mp_rank != 0
    with tqdm(total=settings.steps, desc="training", unit="step", dynamic_ncols=True, disable=silent) as progress:
        for step, micro_batches in zip(range(settings.steps), steps, strict=False):
            metrics = train_step(model, optimizer, micro_batches, settings, step)
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


def train_step(
    model: MetaModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: MicroBatches,
    settings: TrainSettings,
    step: int,
) -> StepMetrics:
    """One optimizer step over all micro-batches of all data-parallel ranks.

    The loss is the sum over learned tokens divided by their count over all ranks and micro-batches, so that it does
    not depend on how the examples are dealt out; gradients are summed over the ranks accordingly.
    """
    start = time.perf_counter()
    state = model.llma.state
    lr = cosine_lr(step, steps=settings.steps, warmup=settings.warmup, lr=settings.lr, min_lr=settings.min_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    learned = [(labels[:, 1:] != 0).sum() for _, labels in micro_batches]
    tokens = sum(examples.numel() for examples, _ in micro_batches)
    sums = torch.stack([torch.stack(learned).sum().double(), torch.tensor(float(tokens), dtype=torch.float64)])
    all_learned, all_tokens = _sum_over(sums.to(state.device), state.dp_group).tolist()
    losses = torch.zeros(2, dtype=torch.float64, device=state.device)
    for (examples, labels), count in zip(micro_batches, learned, strict=True):
        loss, extras = model(examples, labels)
        balance, weight = extras["load_balancing"]
        share = loss * count / max(1.0, all_learned)
        (share + balance * weight / len(micro_batches)).backward()
        # The balance is the same on all data-parallel ranks; the sum below would count it once for each.
        losses += torch.stack([share.detach(), balance.detach() / len(micro_batches) / state.dp_size])
    loss_value, balance_value = _sum_over(losses, state.dp_group).tolist()
    limit = settings.clip_grad if settings.clip_grad > 0 else float("inf")
    grad_norm = _whole(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)).item()
    if not math.isfinite(loss_value + balance_value + grad_norm):
        raise on_all_ranks(
            FloatingPointError(
                f"step {step}: loss {loss_value} with gradient norm {grad_norm} is not finite; "
                "lower the learning rate or clip the gradients harder"
            )
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    return StepMetrics(step, loss_value, balance_value, lr, grad_norm, all_tokens / seconds)


def _sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def _whole(value: Tensor) -> Tensor:
    """A norm over DTensors is one itself."""
    full = getattr(value, "full_tensor", None)
    return value if full is None else full()
