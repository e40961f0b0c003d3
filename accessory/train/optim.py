"""The optimizers, which parameters each rate is of, and clipping."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accessory.parallel.ops import reduce_from_region
from accessory.parallel.plan import split_of
from accessory.parallel.state import ParallelState
from accessory.train.adamw8bit import AdamW8bit, refusal, refuse_absent, state_bytes
from accessory.train.muon import Cut, Muon, matrix_step_bytes
from accessory.train.options import FinetuneOptions, OptimizerName


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How many times the run's learning rate the rate of some parameters is."""

    router: float = 1.0
    embedding: float = 1.0
    lora_b: float = 1.0

    @classmethod
    def of(cls, options: FinetuneOptions) -> Self:
        """Those that a run asks for."""
        own = {"router": options.lr_router, "embedding": options.lr_embeddings}
        ratios = {kind: rate / options.lr for kind, rate in own.items() if rate is not None}
        return cls(**ratios, lora_b=1.0 if options.lora_plus is None else options.lora_plus)

    def __call__(self, name: str) -> float:
        kind = _kind(name)
        if kind == "lora":
            return self.lora_b if "lora_b" in name else 1.0
        return {"router": self.router, "embedding": self.embedding}.get(kind, 1.0)


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float, rates: Rates | None = None
) -> torch.optim.AdamW:
    """Fused AdamW with betas 0.9 and 0.95; norms, biases and sinks do not decay.

    Args:
        parameters: of a Transformer or of the MetaModel around it.
    """
    return torch.optim.AdamW(_groups(parameters, weight_decay, rates), lr=lr, betas=_BETAS, fused=True)


def muon(
    parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float, rates: Rates | None = None
) -> Muon:
    """Muon for the matrices of attention, experts and adapters, and `adamw` for embedding, head, router and vectors."""
    named = list(parameters)
    both = ([own for own in named if (_kind(own[0]) in _MUON_KINDS) == asked] for asked in (True, False))
    return Muon(*(_groups(some, weight_decay, rates) for some in both), lr=lr, betas=_BETAS)


def adamw8bit(
    parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float, rates: Rates | None = None
) -> AdamW8bit:
    """`adamw` whose moments are 8-bit codes."""
    return AdamW8bit(_groups(parameters, weight_decay, rates), lr=lr, betas=_BETAS)


class Kind(NamedTuple):
    """A kind of optimizer.

    Attributes:
        build: makes one, with the arguments of `adamw`.
        states: names of what it keeps of a matrix, each as large as that; for all else it keeps what AdamW does.
        bytes: of each number of a state, by the shape of the whole parameter.
        step: the most bytes that a step of a matrix needs besides, as `muon.matrix_step_bytes`; None: next to none.
        absent: raises ValueError where a package that it needs is not there.
        refuses: what it says where it cannot step a parameter of one shape of which a rank holds a part of the other,
            else nothing; None: it can step all.
    """

    build: Callable[..., torch.optim.Optimizer]
    states: tuple[str, ...]
    bytes: Callable[[Sequence[int]], float] = lambda _: 4.0
    step: Callable[..., int] | None = None
    absent: Callable[[], None] | None = None
    refuses: Callable[[Sequence[int], Sequence[int]], str] | None = None


_BETAS = (0.9, 0.95)
_MUON_KINDS = ("attention", "expert", "dense", "shared", "lora")
_ADAMW_STATES = ("exp_avg", "exp_avg_sq")

OPTIMIZERS: dict[OptimizerName, Kind] = {
    "adamw": Kind(adamw, _ADAMW_STATES),
    "adamw8bit": Kind(adamw8bit, AdamW8bit.STATES, state_bytes, absent=refuse_absent, refuses=refusal),
    "muon": Kind(muon, Muon.STATES, step=matrix_step_bytes),
}


def make_optimizer(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """The optimizer that a run asks for, of the parameters that train."""
    build = OPTIMIZERS[options.optimizer].build
    rates = Rates.of(options)
    return build(model.named_parameters(), lr=options.lr, weight_decay=options.weight_decay, rates=rates)


def refuse_absent_optimizer(name: OptimizerName) -> None:
    """Raise ValueError where the optimizer needs a package that is not installed."""
    absent = OPTIMIZERS[name].absent
    if absent is not None:
        absent()


def states_of(optimizer: OptimizerName, name: str) -> tuple[str, ...]:
    """What an optimizer keeps of a parameter that is as large as it."""
    return OPTIMIZERS[optimizer].states if _kind(name) in _MUON_KINDS else _ADAMW_STATES


def kept_bytes(optimizer: OptimizerName, name: str, shape: Sequence[int]) -> float:
    """What an optimizer keeps for each number of a parameter whose whole shape is this."""
    return len(states_of(optimizer, name)) * OPTIMIZERS[optimizer].bytes(shape)


def step_bytes(
    optimizer: OptimizerName, name: str, shape: Sequence[int], own: Sequence[int], cuts: Sequence[Cut], *, gpu: bool
) -> int:
    """The most that an optimizer's step needs for a parameter, beside what is kept of it.

    Args:
        shape, own: of the whole parameter, and of what a rank holds.
        cuts: how it lies along each axis of its mesh.
    """
    needed = OPTIMIZERS[optimizer].step if _kind(name) in _MUON_KINDS else None
    return 0 if needed is None else needed(shape, own, cuts, gpu=gpu)


def _kind(name: str) -> str:
    return split_of(name.removeprefix("llma.")).kind


def _groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, rates: Rates | None
) -> list[dict[str, Any]]:
    """Groups of parameters that train, by decay and by how many times the run's rate theirs is ("rate")."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            decay = 0.0 if _kind(name) in ("norm", "bias", "sink") else weight_decay
            found.setdefault((decay, 1.0 if rates is None else rates(name)), []).append(parameter)
    return [{"params": own, "weight_decay": decay, "rate": rate} for (decay, rate), own in found.items()]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, state: ParallelState) -> float:
    """Scale the gradients so that their norm, taken over the whole model on all ranks, is at most ``limit``.

    As torch.nn.utils.clip_grad_norm_, which for DTensors that are whole on several ranks first divides every gradient
    by the number of these (8 % of a step's time here); a sum of squares can be divided instead.

    Args:
        limit: 0 or less: do not scale.

    Returns:
        The norm before, the same on every rank.
    """
    own: dict[int, list[torch.Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            sizes = [
                gradient.device_mesh.size(axis) for axis, kind in enumerate(gradient.placements) if kind.is_replicate()
            ]
            own.setdefault(math.prod(sizes), []).append(gradient.to_local())
        elif gradient is not None:
            own.setdefault(1, []).append(gradient)
    squares = torch.zeros((), dtype=torch.float64, device=state.device)
    for copies, gradients in own.items():
        squares += torch.nn.utils.get_total_norm(gradients).double().square() / copies
    norm = reduce_from_region(reduce_from_region(squares, state.mp_group), state.dp_group).sqrt().item()
    if 0 < limit < norm < math.inf:
        for gradients in own.values():
            torch._foreach_mul_(gradients, limit / norm)
    return norm
