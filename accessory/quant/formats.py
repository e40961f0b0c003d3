"""How quantized weights are coded: one record for each format, which all that differs between them is asked of.

A quantized weight is two or three tensors, the last axis of each along the inputs.

=====  ============================  ===================================  ==========================================
form   codes                         scale                                a weight is
=====  ============================  ===================================  ==========================================
int8   int8 (..., R, D)              float32 (..., R, 1)                  code * scale
int4   uint8 (..., R, D / 2)         bfloat16 (..., R, D / group)         (code - zero / 16) * scale
nf4    uint8 (..., R, D / 2)         float32 (..., R, D / 64)             NF4[code] * scale
fp8    float8_e4m3fn (..., R, D)     float32 (..., R, D / 128)            code * scale
mxfp4  uint8 (..., R, D / 2)         bfloat16 (..., R, D / 32)            MXFP4[code] * scale
=====  ============================  ===================================  ==========================================

int4 also has ``zero``, uint8 (..., R, D / group). Two 4-bit codes share a byte, that of the even input in the upper
half.

Shape letters: R rows (outputs), D depth (inputs), G groups of a row, N inputs of a group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.config import QUANT_FORMS, QuantForm
from accessory.config.quant import DEFAULT_GROUP_SIZE


class Stored(NamedTuple):
    """One tensor of a quantized matrix.

    Attributes:
        inputs: of a row, for which one element stands; 0: the whole row.
    """

    dtype: torch.dtype
    inputs: int

    def elements(self, inputs: int) -> int:
        """How many a row of so many inputs takes."""
        return inputs // self.inputs if self.inputs else 1


@dataclass(frozen=True, eq=False)
class Format:
    """A format.

    Attributes:
        name: what files and flags call it, and its tensors in a checkpoint begin with.
        tensors: of a matrix, by the names of `QuantizedWeight`'s fields.
        encode: of float32 values (R, D), the tensors in this order. Where one stands for whole rows it also takes the
            largest magnitudes of these, (R,), or None.
        decode: of the tensors, with None for one that is not there, float32 values (..., R, D).
        kind: its number in quantized_weight.h; None: the native library does not read it, and products round no
            activations.
        triton: its name in the Triton kernels; None: they do not read it.
        levels: what each 4-bit code stands for, before zero point and scale.
        step: of the levels in 8 bits, beside activations in 8 bits; 1 where they are integers.
        calibrated: `gptq` rounds to it.
    """

    name: QuantForm
    tensors: Mapping[str, Stored]
    encode: Callable[..., tuple[Tensor, ...]]
    decode: Callable[..., Tensor]
    kind: int | None = None
    triton: str | None = None
    levels: tuple[float, ...] = ()
    step: float = 1.0
    calibrated: bool = False

    @property
    def group(self) -> int:
        """Neighbouring inputs that no cut may part."""
        return max(stored.inputs for stored in self.tensors.values())

    @property
    def key(self) -> str:
        """The name in `FORMATS`, which tells groups apart too."""
        return f"{self.name}-{self.group}"

    @property
    def whole_rows(self) -> bool:
        """Whether a tensor stands for whole rows, so that who holds a part of them must know of the rest."""
        return any(not stored.inputs for stored in self.tensors.values())

    @property
    def in_halves(self) -> bool:
        """Whether two codes share a byte."""
        return self.tensors["codes"].inputs == 2

    def depth(self, codes: Tensor) -> int:
        """How many inputs a weight with such codes has."""
        return codes.shape[-1] * self.tensors["codes"].inputs

    def __reduce__(self) -> tuple[Callable[[str, int], "Format"], tuple[str, int]]:
        return format_of, (self.name, self.group)


# ---- int8: one scale for each output row, symmetric ------------------------------------------------------------


def row_maximum(values_RD: Tensor) -> Tensor:
    """Largest magnitude of each row, float32 (R, 1)."""
    return values_RD.float().abs().amax(-1, keepdim=True)


def _encode_int8(values_RD: Tensor, row_max: Tensor | None = None) -> tuple[Tensor, Tensor]:
    largest = row_maximum(values_RD) if row_max is None else row_max.float().reshape(-1, 1)
    scale = largest / torch.full_like(largest, 127)  # a tensor: with a number, some devices multiply by its inverse
    codes = (values_RD / torch.where(scale > 0, scale, 1)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def _decode_int8(codes: Tensor, scale: Tensor, zero: None, *, in_steps: bool) -> Tensor:
    return codes * scale


# ---- int4: groups of neighbouring inputs, each with a scale and a zero point in sixteenths of a step -----------
#
# A bfloat16 scale is exact enough, since the codes are chosen for the scale as it was rounded; and it cannot overflow
# or vanish where the weights do not.


def _encode_int4(values_RD: Tensor, *, group: int) -> tuple[Tensor, Tensor, Tensor]:
    values_RGN = values_RD.unflatten(-1, (-1, group))
    scale, zero = grid(values_RGN)
    codes = nearest(values_RGN, scale, zero)
    return pack(codes.flatten(-2).to(torch.uint8)), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)


def _decode_int4(codes: Tensor, scale: Tensor, zero: Tensor, *, in_steps: bool, group: int) -> Tensor:
    values_RGN = unpack(codes).unflatten(-1, (-1, group)) - zero.unsqueeze(-1).float() / 16
    return (values_RGN * scale.float().unsqueeze(-1)).flatten(-2)


def grid(values_RGN: Tensor) -> tuple[Tensor, Tensor]:
    """Scale, bfloat16 (R, G, 1), and zero point in sixteenths of a step, float32 (R, G, 1), that span the values."""
    low = values_RGN.amin(-1, keepdim=True).clamp_(max=0)
    high = values_RGN.amax(-1, keepdim=True).clamp_(min=0)
    scale = ((high - low) / 15).bfloat16()
    return scale, (low / _divisor(scale) * -16).round_().clamp_(0, 255)


def nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The codes, as floats, of what a grid holds nearest to the values."""
    return (values / _divisor(scale)).add_(zero / 16).round_().clamp_(0, 15)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale.float(), 1)


def pack(codes_RD: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, the even input's in the upper half; (R, D) -> (R, D / 2)."""
    return codes_RD[..., 0::2] << 4 | codes_RD[..., 1::2]


def unpack(codes: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack((codes >> 4, codes & 15), dim=-1).flatten(-2)


# ---- nf4: blocks of 64 inputs, a float32 scale each, 16 levels at the quantiles of a normal distribution --------
#
# Dettmers et al., 2023 (https://arxiv.org/abs/2305.14314), section 3; the layout is bitsandbytes' (its absmax is our
# scale). Its scales are not quantized once more: with them in float32 a weight has 4.5 bits.

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_STEP = 1 / 112.03  # that which moves the levels least, by 0.3 % of their root mean square
_NF4_GROUP = 64


def _encode_nf4(values_RD: Tensor) -> tuple[Tensor, Tensor]:
    values_RGN = values_RD.unflatten(-1, (-1, _NF4_GROUP))
    scale = values_RGN.abs().amax(-1, keepdim=True)
    values = (values_RGN / torch.where(scale > 0, scale, 1)).flatten(-2)
    levels = torch.tensor(NF4)
    # A code counts the middles between levels that lie below its value. torch.bucketize took twice as long.
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for between in ((levels[1:] + levels[:-1]) / 2).tolist():
        codes += values > between
    return pack(codes), scale.squeeze(-1)


def _decode_nf4(codes: Tensor, scale: Tensor, zero: None, *, in_steps: bool) -> Tensor:
    levels = torch.tensor(NF4, dtype=torch.float32, device=codes.device)
    if in_steps:
        levels = (levels / NF4_STEP).round() * NF4_STEP
    return _looked_up(codes, scale, levels, _NF4_GROUP)


def _looked_up(codes: Tensor, scale: Tensor, levels: Tensor, group: int) -> Tensor:
    values_RGN = levels[unpack(codes).int()].unflatten(-1, (-1, group))
    return (values_RGN * scale.float().unsqueeze(-1)).flatten(-2)


# ---- fp8: floats of 8 bits, 4 of them exponent and 3 mantissa, in blocks of 128 inputs with a float32 scale each -
#
# Micikevicius et al., 2022 (https://arxiv.org/abs/2209.05433). A scale is one row's, where releases share one among 128
# rows too: theirs are repeated, for 3 % more bytes, and every row can be cut off.

_FP8_GROUP = 128
_FP8_MOST = torch.finfo(torch.float8_e4m3fn).max


def _encode_fp8(values_RD: Tensor) -> tuple[Tensor, Tensor]:
    values_RGN = values_RD.unflatten(-1, (-1, _FP8_GROUP))
    scale = values_RGN.abs().amax(-1, keepdim=True) / _FP8_MOST
    codes = (values_RGN / torch.where(scale > 0, scale, 1)).clamp_(-_FP8_MOST, _FP8_MOST)
    return codes.flatten(-2).to(torch.float8_e4m3fn), scale.squeeze(-1)


def _decode_fp8(codes: Tensor, scale: Tensor, zero: None, *, in_steps: bool) -> Tensor:
    return (codes.float().unflatten(-1, (-1, _FP8_GROUP)) * scale.unsqueeze(-1)).flatten(-2)


# ---- mxfp4: floats of 4 bits, 2 of them exponent and 1 mantissa, in blocks of 32 inputs that share a power of two -
#
# OCP Microscaling Formats 1.0, section 5.3; gpt-oss is released so. A file of such a release has the exponent alone,
# which is bfloat16's; what it holds is encoded again without a loss.

MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MXFP4_GROUP = 32


def _encode_mxfp4(values_RD: Tensor) -> tuple[Tensor, Tensor]:
    values_RGN = values_RD.unflatten(-1, (-1, _MXFP4_GROUP))
    largest = values_RGN.abs().amax(-1, keepdim=True)
    # The largest becomes 4 to 8, of which what lies above 6 is cut; or half of that, where this errs less.
    mantissa, exponent = largest.frexp()
    scale = torch.ldexp(torch.ones_like(mantissa), (exponent - 3).clamp_(-126, 126)) * (largest > 0)
    levels = torch.tensor(MXFP4, dtype=torch.float32, device=values_RGN.device)
    first, second = (_nearest_mxfp4(values_RGN, own) for own in (scale, 2 * scale))
    lost, then = (
        (levels[codes.int()] * own - values_RGN).square_().sum(-1, keepdim=True)
        for codes, own in ((first, scale), (second, 2 * scale))
    )
    codes = torch.where(then < lost, second, first)
    scale = torch.where(then < lost, 2 * scale, scale)
    return pack(codes.flatten(-2)), scale.squeeze(-1).bfloat16()


def _nearest_mxfp4(values_RGN: Tensor, scale: Tensor) -> Tensor:
    """The codes, of two that are as near the even one; a code counts the middles between levels below its value."""
    values = values_RGN / torch.where(scale > 0, scale, 1)
    sizes, codes = values.abs(), torch.zeros_like(values, dtype=torch.uint8)
    for code, (low, high) in enumerate(pairwise(MXFP4[:8])):
        codes += sizes >= (low + high) / 2 if code % 2 else sizes > (low + high) / 2
    return codes | (values < 0).to(torch.uint8) << 3


def _decode_mxfp4(codes: Tensor, scale: Tensor, zero: None, *, in_steps: bool) -> Tensor:
    levels = torch.tensor(MXFP4, dtype=torch.float32, device=codes.device)
    return _looked_up(codes, scale, levels, _MXFP4_GROUP)


# ---- all of them -----------------------------------------------------------------------------------------------


def _int4(group: int, kind: int) -> Format:
    return Format(
        "int4",
        {
            "codes": Stored(torch.uint8, 2),
            "scale": Stored(torch.bfloat16, group),
            "zero": Stored(torch.uint8, group),
        },
        partial(_encode_int4, group=group),
        partial(_decode_int4, group=group),
        kind=kind,
        triton="int4",
        levels=tuple(range(16)),
        calibrated=True,
    )


FORMATS = {
    own.key: own
    for own in (
        Format(
            "int8",
            {"codes": Stored(torch.int8, 1), "scale": Stored(torch.float32, 0)},
            _encode_int8,
            _decode_int8,
            kind=0,
            triton="int8",
        ),
        _int4(32, kind=1),
        _int4(64, kind=2),
        Format(
            "nf4",
            {"codes": Stored(torch.uint8, 2), "scale": Stored(torch.float32, _NF4_GROUP)},
            _encode_nf4,
            _decode_nf4,
            kind=3,
            triton="nf4",
            levels=NF4,
            step=NF4_STEP,
        ),
        Format(
            "fp8",
            {"codes": Stored(torch.float8_e4m3fn, 1), "scale": Stored(torch.float32, _FP8_GROUP)},
            _encode_fp8,
            _decode_fp8,
        ),
        Format(
            "mxfp4",
            {"codes": Stored(torch.uint8, 2), "scale": Stored(torch.bfloat16, _MXFP4_GROUP)},
            _encode_mxfp4,
            _decode_mxfp4,
            kind=4,
            levels=MXFP4,
            step=0.5,
        ),
    )
}

# Of a quantized matrix's tensors in memory and on disk, by the names of their parameters; and those for whole rows.
TENSOR_DTYPES = {f"{own.name}_{name}": part.dtype for own in FORMATS.values() for name, part in own.tensors.items()}
ROW_TENSORS = {
    f"{own.name}_{name}" for own in FORMATS.values() for name, part in own.tensors.items() if not part.inputs
}


def format_of(name: str, group_size: int = DEFAULT_GROUP_SIZE) -> Format:
    """The record of what a `QuantArgs` names.

    Raises:
        ValueError: no such format, or not in such groups.
    """
    groups = {own.group: own for own in FORMATS.values() if own.name == name}
    if not groups:
        raise ValueError(f"quant={name} is unknown: it may be {', '.join(QUANT_FORMS)}")
    if len(groups) == 1:
        return next(iter(groups.values()))
    if group_size not in groups:
        raise ValueError(f"group size {group_size} is not offered: it may be {' or '.join(map(str, groups))}")
    return groups[group_size]
