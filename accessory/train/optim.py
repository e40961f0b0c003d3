"""The optimizer, and clipping."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accessory.parallel.ops import reduce_from_region
from accessory.parallel.plan import split_of
from accessory.parallel.state import ParallelState


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW with betas 0.9 and 0.95; norms and biases do not decay.

    Args:
        parameters: of a Transformer or of the MetaModel around it.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            kind = split_of(name.removeprefix("llma.")).kind
            (plain if kind in ("norm", "bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


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
