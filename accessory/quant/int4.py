"""int4: groups of neighbouring inputs, each with a scale in bfloat16 and a zero point in sixteenths of a step.

A bfloat16 scale is exact enough, since the codes are chosen for the scale as it was rounded; and it cannot overflow
or vanish where the weights do not.

Shape letters: R rows (outputs), D depth (inputs), G groups of a row, N inputs of a group.
"""

import torch
from torch import Tensor


def encode(values_RD: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, uint8 (R, D / 2), scales, bfloat16 (R, G), and zero points, uint8 (R, G).

    Args:
        values_RD: float32.
    """
    values_RGN = values_RD.unflatten(-1, (-1, group))
    scale, zero = grid(values_RGN)
    codes = nearest(values_RGN, scale, zero)
    return pack(codes.flatten(-2).to(torch.uint8)), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)


def grid(values_RGN: Tensor) -> tuple[Tensor, Tensor]:
    """Scale, bfloat16 (R, G, 1), and zero point in sixteenths of a step, float32 (R, G, 1), that span the values."""
    low = values_RGN.amin(-1, keepdim=True).clamp_(max=0)
    high = values_RGN.amax(-1, keepdim=True).clamp_(min=0)
    scale = ((high - low) / 15).bfloat16()
    return scale, (low / _step(scale) * -16).round_().clamp_(0, 255)


def nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The codes, as floats, of what a grid holds nearest to the values."""
    return (values / _step(scale)).add_(zero / 16).round_().clamp_(0, 15)


def _step(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale.float(), 1)


def pack(codes_RD: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, the even input's in the upper half; (R, D) -> (R, D / 2)."""
    return codes_RD[..., 0::2] << 4 | codes_RD[..., 1::2]
