"""nf4: blocks of 64 inputs, a float32 scale each, 16 levels at the quantiles of a normal distribution.

Dettmers et al., 2023 (https://arxiv.org/abs/2305.14314), section 3; the layout is bitsandbytes'. Its scales are not
quantized once more: with them in float32 a weight has 4.5 bits, within what is allowed.

Shape letters: R rows (outputs), D depth (inputs), G groups of a row, N inputs of a group.
"""

import torch
from torch import Tensor

from accessory.kernels.quantized import NF4, NF4_GROUP
from accessory.quant.int4 import pack


def encode(values_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 (R, D / 2), and scales, float32 (R, G): a block's largest magnitude.

    Args:
        values_RD: float32.
    """
    values_RGN = values_RD.unflatten(-1, (-1, NF4_GROUP))
    scale = values_RGN.abs().amax(-1, keepdim=True)
    values = (values_RGN / torch.where(scale > 0, scale, 1)).flatten(-2)
    levels = torch.tensor(NF4)
    # A code counts the middles between levels that lie below its value. torch.bucketize took twice as long.
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for between in ((levels[1:] + levels[:-1]) / 2).tolist():
        codes += values > between
    return pack(codes), scale.squeeze(-1)
