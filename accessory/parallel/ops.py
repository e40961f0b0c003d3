"""Collectives with gradients, each on a group that it is handed.

A region is the part of a layer in which every rank computes with its own slice of the weights. Megatron-LM's
pair of operations bounds it (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053): `copy_to_region` on what
enters and `reduce_from_region` on what leaves.

Without gradients they are plain collectives, which torch.compile takes into its graph.
"""

from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.quant import QuantizedParameter, QuantizedWeight


@overload
def local(parameter: Tensor) -> Tensor: ...
@overload
def local(parameter: Tensor | QuantizedParameter) -> Tensor | QuantizedWeight: ...
def local(parameter: Tensor | QuantizedParameter) -> Tensor | QuantizedWeight:
    """This rank's own slice of a parameter; in training parameters are DTensors over the model-parallel ranks.

    Its gradient is handed back as it is, so whatever is replicated must get the whole gradient on every rank:
    the operations below see to it.
    """
    to_local = getattr(parameter, "to_local", None)
    own: Any = parameter if to_local is None else to_local()
    return own


def is_distributed(parameter: Tensor) -> bool:
    """Whether it is a DTensor. Not isinstance: importing the class takes 0.7 s, which inference can do without."""
    return hasattr(parameter, "to_local")


def copy_to_region(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Identity; in the backward pass the gradients of all ranks are summed."""
    return _CopyToRegion.apply(x, group) if torch.is_grad_enabled() and not _alone(group) else x


def reduce_from_region(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks; in the backward pass identity. ``x`` may be overwritten."""
    if _alone(group):
        return x
    if torch.is_grad_enabled():
        return _ReduceFromRegion.apply(x, group)
    dist.all_reduce(x, group=group)
    return x


def gather_last_dim(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the ranks' equal slices along the last axis; in the backward pass each takes its own slice.

    The gathered tensor must be used alike on every rank (its gradient is the same on all of them).
    """
    if _alone(group):
        return x
    return _GatherLastDim.apply(x, group) if torch.is_grad_enabled() else _gathered(x, group)


def _alone(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == 1


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim=-1)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same gradient tensor to another consumer.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherLastDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        start = dist.get_rank(ctx.group) * ctx.width
        return grad.narrow(-1, start, ctx.width).contiguous(), None
