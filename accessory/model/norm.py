"""Root-mean-square normalisation (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

import torch
from torch import Tensor, nn

from accessory.parallel.ops import local
from accessory.parallel.state import Place


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, with the statistics in float32 whatever x's dtype."""

    def __init__(self, dim: int, eps: float, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight = place.parameter(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        wide = x.to(torch.float32, copy=True)
        mean_square = torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1]
        scale = torch.rsqrt(mean_square + self.eps)
        if torch.is_grad_enabled():
            return (wide * scale).type_as(x) * local(self.weight).type_as(x)
        # In place: on a CPU fresh memory for each intermediate costs more than the arithmetic.
        return wide.mul_(scale).type_as(x).mul_(local(self.weight))
