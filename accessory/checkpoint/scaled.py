"""Matrices in 8-bit floats whose blocks of 128 x 128 values share a factor, as DeepSeek-V3 and MiniMax-M2 are released.

A file holds ``NAME.weight`` (rows, columns) in float8_e4m3fn and ``NAME.weight_scale_inv`` (blocks of rows, blocks of
columns), by which a block's values are multiplied; the last blocks may be smaller (https://arxiv.org/abs/2412.19437,
section 3.3).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.blocks import Blocks, BlockType
from accessory.errors import CheckpointError

SIDE = 128
_ENDING = "_scale_inv"


class Scaled(Blocks):
    """Such a matrix; it is indexed as a bfloat16 tensor of its shape, by slices, and only what is asked for is made."""

    dtype = torch.bfloat16
    coding = BlockType(f"float8_e4m3fn in blocks of {SIDE} x {SIDE}", 1, 1)

    def __init__(self, name: str, codes: Tensor, factors: Tensor) -> None:
        self.name, self.coded, self._factors, self.shape = name, codes, factors, codes.shape

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        places = [*index, *[slice(None)] * (2 - len(index))]
        values, factors = self.coded[tuple(places)].float(), self._factors.float()
        for axis, (place, size) in enumerate(zip(places, self.shape, strict=True)):
            begin, end, _ = place.indices(size)
            block = torch.arange(begin, max(begin, end)) // SIDE
            factors = factors.index_select(axis, block)
        return (values * factors).to(self.dtype)


def with_factors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors, with each matrix that has factors in one with them.

    Raises:
        CheckpointError: the factors are not as many as there are blocks.
    """
    found = {key: value for key, value in tensors.items() if not _belongs(key, tensors)}
    for key, value in found.items():
        if (factors := tensors.get(f"{key}{_ENDING}")) is None or not _belongs(f"{key}{_ENDING}", tensors):
            continue
        wanted = tuple(-(-size // SIDE) for size in value.shape)
        if tuple(factors.shape) != wanted:
            raise CheckpointError(
                f"{key}{_ENDING} has shape {tuple(factors.shape)}, and {key} asks for {wanted}, one factor for each "
                f"block of {SIDE} x {SIDE}: copy the file again"
            )
        found[key] = Scaled(key, value, factors)
    return found


def _belongs(key: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a tensor holds the factors of one beside it."""
    matrix = tensors.get(key.removesuffix(_ENDING)) if key.endswith(_ENDING) else None
    return isinstance(matrix, Tensor) and matrix.dtype == torch.float8_e4m3fn and matrix.dim() == 2
