"""Matrices in floats of few bits whose blocks share a factor.

**8-bit**, in blocks of 128 x 128 values, as DeepSeek-V3 and MiniMax-M2 are released. A file holds ``NAME.weight``
(rows, columns) in float8_e4m3fn and ``NAME.weight_scale_inv`` (blocks of rows, blocks of columns), by which a block's
values are multiplied; the last blocks may be smaller (https://arxiv.org/abs/2412.19437, section 3.3).

**MXFP4**, in blocks of 32 neighbouring values of a row, as gpt-oss is released. A file holds ``NAME_blocks`` (experts,
rows, blocks, 16) uint8, two codes in a byte, the first in its lower bits, and ``NAME_scales`` (experts, rows, blocks)
uint8, exponents of two with 127 added (OCP Microscaling Formats 1.0, section 5.3).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.checkpoint.blocks import Blocks, BlockType
from accessory.errors import CheckpointError
from accessory.quant.formats import MXFP4

SIDE = 128


class Scaled(Blocks):
    """Such a matrix; it is indexed as a bfloat16 tensor of its shape, by slices, and only what is asked for is made."""

    dtype = torch.bfloat16
    coding = BlockType(f"float8_e4m3fn in blocks of {SIDE} x {SIDE}", 1, 1)

    def __init__(self, name: str, codes: Tensor, factors: Tensor) -> None:
        self.name, self.coded, self.shape, self.factors = name, codes, codes.shape, Factors(factors, codes.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        return (self.coded[index].float() * self.factors[index]).to(self.dtype)


class Factors:
    """What each value of a `Scaled` is multiplied by, indexed as a float32 tensor of its shape, by slices."""

    dtype = torch.float32

    def __init__(self, factors: Tensor, shape: torch.Size) -> None:
        self._factors, self.shape = factors, shape

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        factors = self._factors.float()
        for axis, size in enumerate(self.shape):
            begin, end, _ = (index[axis] if axis < len(index) else slice(None)).indices(size)
            factors = factors.index_select(axis, torch.arange(begin, max(begin, end)) // SIDE)
        return factors


# Of codes: a sign, two bits of exponent and one of mantissa; of a byte's two, whose bits are those of one int32; and
# factors by their exponents.
_VALUES = torch.tensor(MXFP4).bfloat16()
_PAIRS = torch.stack((_VALUES.repeat(16), _VALUES.repeat_interleave(16)), dim=-1).view(torch.int32).squeeze(-1)
_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 127).bfloat16()


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
        codes, exponents = self.coded[tuple(places)], self._exponents[tuple(places)]
        values = _PAIRS.index_select(0, codes.flatten().int()).view(self.dtype).view(*exponents.shape, -1)
        # Exact: a value has two bits beside its exponent.
        values *= _POWERS[exponents.int()].unsqueeze(-1)
        skipped = first * self.coding.size
        return values.flatten(-2)[..., begin - skipped : end - skipped]


class _Form(NamedTuple):
    """How codes and factors are told: how their names end, the codes' dtype and axes, and the factors' shape by theirs.

    Attributes:
        whole: codes without factors are none.
    """

    codes: str
    factors: str
    dtype: torch.dtype
    axes: int
    wanted: Callable[[tuple[int, ...]], tuple[int, ...]]
    joined: Callable[[str, Tensor, Tensor], Blocks]
    whole: bool

    def is_codes(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.dtype == self.dtype and tensor.dim() == self.axes


_FORMS = (
    _Form(
        *("", "_scale_inv", torch.float8_e4m3fn, 2),
        wanted=lambda shape: tuple(-(-size // SIDE) for size in shape),
        joined=Scaled,
        whole=False,
    ),
    _Form("_blocks", "_scales", torch.uint8, 4, wanted=lambda shape: shape[:-1], joined=Packed, whole=True),
)


def with_factors(tensors: Mapping[str, Any], elsewhere: Callable[[str], Any]) -> dict[str, Any]:
    """A file's tensors, with each matrix that has factors in one with them, under the name of its codes.

    Args:
        elsewhere: what another file of the folder has under a name, or None: a release may be cut between the two.

    Raises:
        CheckpointError: the factors are not there, or not as many as there are blocks.
    """
    found = dict(tensors)

    def beside(key: str) -> Any:
        return tensors[key] if key in tensors else elsewhere(key)

    for form in _FORMS:
        for key, tensor in tensors.items():
            if key.endswith(form.factors) and form.is_codes(beside(key.removesuffix(form.factors) + form.codes)):
                del found[key]
            elif key.endswith(form.codes) and form.is_codes(tensor):
                name = key.removesuffix(form.codes) + form.factors
                if (factors := beside(name)) is not None:
                    found[key] = form.joined(key, tensor, _checked(name, factors, key, form.wanted(tensor.shape)))
                elif form.whole:
                    raise CheckpointError(f"{key} is there without {name}, its factors: copy the folder again")
    return found


def _checked(name: str, factors: Tensor, key: str, wanted: tuple[int, ...]) -> Tensor:
    if tuple(factors.shape) != tuple(wanted):
        raise CheckpointError(
            f"{name} has shape {tuple(factors.shape)}, and {key} asks for {tuple(wanted)}, one factor for each block: "
            "copy the file again"
        )
    return factors
