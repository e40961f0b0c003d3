"""Matrices in floats of few bits whose blocks share a factor.

**8-bit**, in blocks of 128 x 128 values, as DeepSeek-V3 and MiniMax-M2 are released. A file holds ``NAME.weight``
(rows, columns) in float8_e4m3fn and ``NAME.weight_scale_inv`` (blocks of rows, blocks of columns), by which a block's
values are multiplied; the last blocks may be smaller (https://arxiv.org/abs/2412.19437, section 3.3).

**MXFP4**, in blocks of 32 neighbouring values of a row, as gpt-oss is released. A file holds ``NAME_blocks`` (experts,
rows, blocks, 16) uint8, two codes in a byte, the first in its lower bits, and ``NAME_scales`` (experts, rows, blocks)
uint8, exponents of two with 127 added (OCP Microscaling Formats 1.0, section 5.3).
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


# Of codes with a sign, two bits of exponent and one of mantissa.
_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_VALUES = torch.cat((_VALUES, -_VALUES))


class Packed(Blocks):
    """Such matrices in MXFP4, indexed as a bfloat16 tensor (experts, rows, columns), by slices; as `Scaled`."""

    dtype = torch.bfloat16
    coding = BlockType("MXFP4", 32, 17)

    def __init__(self, name: str, codes: Tensor, exponents: Tensor) -> None:
        self.name, self.coded, self._exponents = name, codes, exponents
        self.shape = torch.Size((*exponents.shape[:-1], exponents.shape[-1] * self.coding.size))

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        *places, columns = [*index, *[slice(None)] * (len(self.shape) - len(index))]
        begin, end, _ = columns.indices(self.shape[-1])
        first = begin // self.coding.size
        places.append(slice(first, -(-end // self.coding.size)))
        codes = self.coded[tuple(places)]
        values = _VALUES[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()]
        values = torch.ldexp(values, self._exponents[tuple(places)].int().unsqueeze(-1) - 127).flatten(-2)
        skipped = first * self.coding.size
        return values[..., begin - skipped : end - skipped].to(self.dtype)


def with_factors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors, with each matrix that has factors in one with them.

    Raises:
        CheckpointError: the factors are not as many as there are blocks, or not in the same file.
    """
    tensors = _unpacked(tensors)
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


def _unpacked(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors, with MXFP4's codes and exponents made one under the codes' name."""
    found = dict(tensors)
    for key, codes in tensors.items():
        if not key.endswith("_blocks") or codes.dtype != torch.uint8:
            continue
        other = f"{key.removesuffix('_blocks')}_scales"
        exponents = found.pop(other, None)
        if exponents is None:
            raise CheckpointError(f"{key} lies in a file without its {other}: copy both again")
        if tuple(codes.shape) != (*exponents.shape, 16) or exponents.dtype != torch.uint8:
            raise CheckpointError(
                f"{other} has shape {tuple(exponents.shape)}, and {key}, {tuple(codes.shape)}, asks for one of uint8 "
                "for each 16 bytes: copy the file again"
            )
        found[key] = Packed(key, codes, exponents)
    return found
