"""Root-mean-square normalisation (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

import torch
from torch import Tensor, nn

from accessory import kernels
from accessory.parallel.ops import local
from accessory.parallel.state import Place


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in x's shape and dtype, which is the weight's too."""
    if not torch.is_grad_enabled():
        return kernels.rms_norm(x, weight, eps)
    # With gradients this is faster than F.rms_norm by a fifth (2,048 x 1,024 in bfloat16 on CPU, torch 2.13.0); it
    # rounds before the weight as well, as transformers does, and F.rms_norm only behind it.
    wide = x.to(torch.float32, copy=True)
    mean_square = torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1]
    return (wide * torch.rsqrt(mean_square + eps)).type_as(x) * weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, with the statistics in float32 whatever x's dtype."""

    def __init__(self, dim: int, eps: float, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight = place.parameter(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        return rms_norm(x, local(self.weight).type_as(x), self.eps)

    def after_adding(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm."""
        if torch.is_grad_enabled():
            x = x + delta
            return x, self(x)
        return kernels.add_rms_norm(x, delta, local(self.weight).type_as(x), self.eps)
