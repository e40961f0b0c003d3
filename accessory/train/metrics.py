"""What is measured in each step of training.

Shape letters: L layers, E experts.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

# Digits of a share in a record: finer than one token in a million is noise.
_SHARE_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step, as rank 0 reports it.

    Attributes:
        step: optimizer steps taken so far; the first is 1.
        epoch: epochs done, such as 0.25.
        loss: cross-entropy, mean over the learned tokens of all ranks, natural logarithm.
        balance_loss: the load-balancing loss before its weight, mean over micro-batches; 1 is even.
        lr: learning rate.
        grad_norm: of all gradients together, before clipping.
        tokens_per_s: tokens of all ranks that are not padding.
        learned_per_s: those of them that the loss is over.
        padding: share of the rows' places that hold no token, 0 to 1.
        memory: GiB, the highest that any rank has held so far (see `peak_memory_gib`).
        pairs_LE: (layers, experts) pairs of token and expert in this step, on any device.
        z_loss: the router's z-loss before its weight; None where it has no weight.
        mfu: model FLOPs per second over the hardware's peak, 0 to 1; None where that peak is unknown.
        loss_scale: factor on the loss in float16; None in other precisions.
        skipped: gradients in float16 overflowed and the step was not taken.
    """

    step: int
    epoch: float
    loss: float
    balance_loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    learned_per_s: float
    padding: float
    memory: float
    pairs_LE: Tensor
    z_loss: float | None = None
    mfu: float | None = None
    loss_scale: float | None = None
    skipped: bool = False

    def shares(self) -> Tensor:
        """float64 (layers, experts) on the CPU: each expert's share of its layer's pairs."""
        return expert_shares(self.pairs_LE)

    @property
    def max_vio(self) -> float:
        """`max_violation` of the step."""
        return max_violation(self.shares())

    @property
    def dead_experts(self) -> int:
        """`without_tokens` in the step, over all layers."""
        return int(without_tokens(self.shares()).sum())

    def scalars(self) -> dict[str, float]:
        """The single numbers by name, without step and epoch; those that do not apply are left out."""
        speed = ("tokens_per_s", "learned_per_s", "padding", "memory")
        experts = ("max_vio", "dead_experts")
        names = ("loss", "balance_loss", "lr", "grad_norm", *speed, *experts, "z_loss", "mfu", "loss_scale")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_record(self) -> dict[str, Any]:
        """The step as a line of log.jsonl: valid JSON, in which a value that is not finite is null.

        Returns:
            step, epoch, then `scalars`, among them MaxVio and the number of experts without tokens; heaviest and
            lightest, each a list over layers of [expert, share]; experts, each one's share, mean over layers; and
            skipped, true, where the step was not taken.
        """
        numbers = {"epoch": self.epoch, **self.scalars()}
        shares_LE = self.shares()
        record: dict[str, Any] = {
            "step": self.step,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "heaviest": [[expert, round(share, _SHARE_DIGITS)] for expert, share in heaviest(shares_LE)],
            "lightest": [[expert, round(share, _SHARE_DIGITS)] for expert, share in lightest(shares_LE)],
            "experts": [round(share, _SHARE_DIGITS) for share in shares_LE.mean(0).tolist()],
        }
        if self.skipped:
            record["skipped"] = True
        return record


def expert_shares(pairs_LE: Tensor) -> Tensor:
    """float64 (layers, experts) on the CPU, each layer summing to 1; all 0 in a layer without pairs."""
    pairs_LE = pairs_LE.detach().to("cpu", torch.float64)
    return pairs_LE / pairs_LE.sum(-1, keepdim=True).clamp(min=1)


def max_violation(shares_LE: Tensor) -> float:
    """MaxVio (Wang et al., 2024, https://arxiv.org/abs/2408.15664): largest load / mean load - 1, 0 where all are even.

    Mean over the layers that have pairs; 0 where none has.
    """
    largest_L = shares_LE[shares_LE.any(-1)].amax(-1)
    return float(largest_L.mean() * shares_LE.shape[-1] - 1) if len(largest_L) else 0.0


def without_tokens(shares_LE: Tensor) -> Tensor:
    """Bool (layers, experts): experts to which no token went, in layers that have pairs."""
    return (shares_LE == 0) & shares_LE.any(-1, keepdim=True)


def heaviest(shares_LE: Tensor) -> list[tuple[int, float]]:
    """(expert, share) with the largest share of each layer; the first of several equal ones."""
    return _numbered(shares_LE, shares_LE.argmax(-1))


def lightest(shares_LE: Tensor) -> list[tuple[int, float]]:
    """(expert, share) with the smallest share of each layer; the first of several equal ones."""
    return _numbered(shares_LE, shares_LE.argmin(-1))


def _numbered(shares_LE: Tensor, experts_L: Tensor) -> list[tuple[int, float]]:
    shares_L = shares_LE.gather(-1, experts_L[:, None]).squeeze(-1)
    return list(zip(experts_L.tolist(), shares_L.tolist(), strict=True))


def peak_memory_gib(device: torch.device) -> float:
    """GiB, the highest so far: on CUDA of allocated tensors, elsewhere of this process's resident set.

    NaN where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30
