"""int8: one scale for each output row, symmetric.

Shape letters: R rows (outputs), D depth (inputs).
"""

import torch
from torch import Tensor


def row_maximum(values_RD: Tensor) -> Tensor:
    """Largest magnitude of each row, float32 (R, 1)."""
    return values_RD.float().abs().amax(-1, keepdim=True)


def encode(values_RD: Tensor, row_max: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes, int8 (R, D), and scales, float32 (R, 1): a row's largest magnitude becomes 127.

    Args:
        values_RD: float32.
        row_max: (R, 1) or (R,), where these are only a part of longer rows: the largest magnitude of the whole rows.
    """
    largest = row_maximum(values_RD) if row_max is None else row_max.float().reshape(-1, 1)
    scale = largest / torch.full_like(largest, 127)  # a tensor: with a number, some devices multiply by its inverse
    codes = (values_RD / torch.where(scale > 0, scale, 1)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale
