"""int4 with an eye on the inputs: the rounding error of one input is made up for by those behind it.

GPTQ, Frantar et al., 2022 (https://arxiv.org/abs/2210.17323), algorithm 1, with the second moments of the inputs kept
in blocks along the diagonal: beyond a block, inputs count as independent. So the moments of a model take a fraction of
its own memory. The format is int4 of formats.py.

Shape letters: R rows (outputs), D depth (inputs), B inputs of a block, N inputs of a group.
"""

import torch
from torch import Tensor

from accessory.quant.formats import grid, nearest, pack

BLOCK = 512
_DAMPING = 0.01  # of the mean second moment, added to each: as the paper has it


def block_of(depth: int, group: int) -> int:
    """B for a matrix of so many inputs: as large as BLOCK allows, whole groups, and a divisor of the depth."""
    return max(block for block in range(group, min(BLOCK, depth) + 1, group) if depth % block == 0)


class InputMoments:
    """Second moments of a matrix's inputs, added up over tokens.

    Attributes:
        sums: float32 (D / B, B, B).
    """

    def __init__(self, depth: int, group: int) -> None:
        block = block_of(depth, group)
        self.sums = torch.zeros(depth // block, block, block)

    def add(self, x_TD: Tensor) -> None:
        """Count tokens' inputs."""
        x_BTN = x_TD.float().unflatten(-1, (self.sums.shape[0], -1)).transpose(0, 1)
        self.sums.baddbmm_(x_BTN.transpose(1, 2), x_BTN)


def encode(values_RD: Tensor, moments: InputMoments, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points, as int4 has them.

    Args:
        values_RD: float32.
    """
    parts = [
        _encode_block(values_RB, second_BB, group)
        for values_RB, second_BB in zip(values_RD.chunk(len(moments.sums), -1), moments.sums, strict=True)
    ]
    codes, scales, zeros = (torch.cat(kind, dim=-1) for kind in zip(*parts, strict=True))
    return pack(codes.to(torch.uint8)), scales, zeros.to(torch.uint8)


def _encode_block(values_RB: Tensor, second_BB: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    values_RB = values_RB.clone()
    inverse_BB = _inverse_root(second_BB)
    codes_RB = torch.empty_like(values_RB)
    scales, zeros = [], []
    for place in range(values_RB.shape[1]):
        if place % group == 0:
            scale, zero = grid(values_RB[:, None, place : place + group])
            scales.append(scale.squeeze(-1))
            zeros.append(zero.squeeze(-1))
        value = values_RB[:, place]
        scale, zero = scales[-1].squeeze(-1), zeros[-1].squeeze(-1)
        codes_RB[:, place] = nearest(value, scale, zero)
        error = (value - (codes_RB[:, place] - zero / 16) * scale.float()) / inverse_BB[place, place]
        values_RB[:, place + 1 :].addr_(error, inverse_BB[place, place + 1 :], alpha=-1)
    return codes_RB, torch.cat(scales, -1), torch.cat(zeros, -1)


def _inverse_root(second_BB: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse; inputs that never came count as independent."""
    second = second_BB.double()
    mean = second.diagonal().mean()
    second.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second)), upper=True).float()
