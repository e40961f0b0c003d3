"""Muon: momentum whose matrices are made orthogonal before each step (https://kellerjordan.github.io/posts/muon/).

Each expert's w1, w3 and w2 is a matrix of its own: the last two axes of a parameter are the matrix, those before them
count matrices. Where ranks hold parts of a matrix, it is brought together for the product and cut again.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from accessory.parallel.ops import local
from accessory.train.trace import trace_call

# The quintic's coefficients, and how often it is applied: singular values end between 0.7 and 1.2.
_A, _B, _C, _TIMES = 3.4445, -4.7750, 2.0315, 5
_MOMENTUM = 0.95
# Of AdamW's update about this is the root of the mean square, whatever a matrix's shape; an orthogonal matrix's is
# 1 / sqrt(its longer side). So scaled, --lr and --weight_decay are AdamW's (https://arxiv.org/abs/2502.16982).
_RMS = 0.2

_FLOAT = 4  # bytes of float32, in which updates are kept and travel

Groups = list[dict[str, Any]]

# They warn of what is slow and not wrong: gloo has no all-to-all, and an axis that both FSDP and the model-parallel
# ranks cut is gathered twice.
for _name in ("_collective_utils", "_redistribute"):
    logging.getLogger(f"torch.distributed.tensor.{_name}").setLevel(logging.ERROR)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices, and AdamW for all else, as one optimizer.

    Args:
        matrices: groups of parameters of two axes or more.
        others: groups of AdamW's.
        betas: AdamW's.
        dtype: of the products; None: bfloat16 on CUDA, as published, and float32 on the CPU, where it is no slower.
    """

    STATES = ("momentum_buffer",)

    def __init__(
        self,
        matrices: Groups,
        others: Groups,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__([*matrices, *others], {"lr": lr, "weight_decay": 0.0})
        self._matrices, self._dtype = self.param_groups[: len(matrices)], dtype
        # It has the same groups, whose rates it so follows, and the same states.
        rest = self.param_groups[len(matrices) :]
        self._others = torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True) if rest else None
        if self._others is not None:
            self._others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; collective over the ranks that hold parts of a parameter, and ``closure`` is not called."""
        for group in self._matrices:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, lr=group["lr"], weight_decay=group["weight_decay"])
        if self._others is not None:
            self._others.step()

    def _step(self, parameter: nn.Parameter, *, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, momentum, own = local(parameter.grad), local(state["momentum_buffer"]), local(parameter)  # type: ignore[arg-type]
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        if lr == 0:  # nothing would change, and a new optimizer is given its states by such a step
            return
        update = self._orthogonal(gradient.lerp(momentum, _MOMENTUM), parameter)
        rows, columns = parameter.shape[-2:]
        own.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * _RMS * math.sqrt(max(rows, columns)))

    def _orthogonal(self, update: Tensor, parameter: nn.Parameter) -> Tensor:
        """`orthogonal` of an update that is cut as the parameter is."""
        if not isinstance(parameter, DTensor) or (whole := _uncut(parameter)) == parameter.placements:
            return orthogonal(update, self._dtype)
        layout: dict[str, Any] = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
        mesh, cut = parameter.device_mesh, parameter.placements
        together = DTensor.from_local(update, mesh, cut, **layout).redistribute(placements=whole)
        made = orthogonal(together.to_local(), self._dtype)
        del together  # what is cut again takes as much
        return DTensor.from_local(made, mesh, whole, **layout).redistribute(placements=cut).to_local()


def orthogonal(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The orthogonal factor of each matrix, nearly: five times x becomes a x + (b g + c g²) x, with g = x xᵀ.

    Args:
        matrices: (..., rows, columns), of any dtype; zeros stay zeros.
        dtype: of the products; None: bfloat16 on CUDA, float32 elsewhere.
    """
    dtype = dtype or _dtype_of_products(matrices.is_cuda)
    x = matrices.to(dtype).flatten(end_dim=-3) if matrices.ndim > 2 else matrices.to(dtype)[None]
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # The largest singular value is then 1 at most.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_TIMES):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)


def _dtype_of_products(gpu: bool) -> torch.dtype:
    return torch.bfloat16 if gpu else torch.float32


# How a parameter lies along one axis of its mesh: the ranks there, and which axis of the tensor they cut.
Cut = tuple[int, int | None]


def whole_matrices(shape: Sequence[int], cuts: Sequence[Cut]) -> list[int | None]:
    """What the same ranks cut where they hold whole matrices: each some of them where their count allows it, else all.

    Args:
        shape: of the whole parameter.
    """
    count = len(shape) - 2
    found: list[int | None] = []
    taken = {axis for _, axis in cuts if axis is not None}
    for ranks, axis in cuts:
        if axis is None or axis < count:
            found.append(axis)
            continue
        free = [one for one in range(count) if one not in taken and shape[one] % ranks == 0]
        taken |= set(free[:1])
        found.append(free[0] if free else None)
    return found


def matrix_step_bytes(shape: Sequence[int], own: Sequence[int], cuts: Sequence[Cut], *, gpu: bool) -> int:
    """The most that a step needs for one parameter, beside what is kept of it.

    Args:
        shape, own: of the whole parameter, and of what the rank holds.
    """
    update = math.prod(own) * _FLOAT
    dtype = _dtype_of_products(gpu)
    whole = whole_matrices(shape, cuts)
    moves = [(*cut, after) for cut, after in zip(cuts, whole, strict=True) if cut[1] != after]
    if not moves:
        return update + trace_call(orthogonal, tuple(own), dtype)
    size = stays = update
    most = 0
    for ranks, before, after in reversed(moves):
        size, stays, needed = _moved(size, ranks, before, after, gpu=gpu)
        most = max(most, needed)
    held = list(shape)
    for (ranks, _), axis in zip(cuts, whole, strict=True):
        if axis is not None:
            held[axis] = -(-held[axis] // ranks)
    most = max(most, stays + trace_call(orthogonal, tuple(held), dtype))
    made = size * (2 if held[-2] > held[-1] else 1)  # of a tall one, which was turned, a copy travels
    for ranks, before, after in moves:
        size, _, needed = _moved(size, ranks, after, before, gpu=gpu)
        most = max(most, made + needed)
    return update + most


def _moved(size: int, ranks: int, before: int | None, after: int | None, *, gpu: bool) -> tuple[int, int, int]:
    """Of so many bytes that are cut otherwise over ranks: what a rank has then, what stays, and the most meanwhile.

    As DTensor does it: without an exchange, as over gloo, all is gathered, and what a rank takes of it is a view. What
    was gathered lies by rank, and is copied where that is not along axis 0; gloo gathers into a buffer of its own.
    """
    if before is None:
        return size // ranks, size // ranks, size // ranks
    if after is not None and gpu:
        return size, size, 3 * size
    gathered = size * ranks
    return gathered if after is None else size, gathered, gathered * (2 if before or not gpu else 1)


def _uncut(parameter: DTensor) -> tuple[Placement, ...]:
    """How its ranks hold whole matrices."""
    kinds = parameter.placements
    axes = [None if isinstance(kind, Replicate) else kind.dim for kind in kinds]  # type: ignore[attr-defined]
    whole = whole_matrices(parameter.shape, list(zip(parameter.device_mesh.shape, axes, strict=True)))
    return tuple(
        kind if before == after else Replicate() if after is None else Shard(after)
        for kind, before, after in zip(kinds, axes, whole, strict=True)
    )
