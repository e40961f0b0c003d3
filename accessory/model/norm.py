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
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * local(self.weight)
