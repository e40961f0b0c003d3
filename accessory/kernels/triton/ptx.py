"""PTX that turns the 8 codes of a word into numbers, for the kernels that read 4-bit weights.

The first operands are what the upper codes of the word's bytes stand for, then as many what the lower ones do; the last
operand is the word.
"""

import struct
from collections.abc import Callable, Sequence
from itertools import product

from accessory.quant.formats import NF4, NF4_STEP


def to_floats(form: str, dtype: str) -> str:
    """For "int4" or "nf4" and "bfloat16" or "float16": two words of two numbers for each half of the codes."""
    bits = _bfloat16 if dtype == "bfloat16" else _float16
    if form == "nf4":
        return _levels_of_16_bits([bits(level) for level in NF4])
    return _counted(bits, 128 if dtype == "bfloat16" else 1024)


def to_integers(form: str) -> str:
    """For "int4" or "nf4": a word of four int8 for each half of the codes; those of nf4 count `NF4_STEP`."""
    if form == "nf4":
        return _levels_of_8_bits([round(level / NF4_STEP) & 255 for level in NF4])
    return "{ and.b32 $1, $2, 0x0f0f0f0f; shr.b32 $0, $2, 4; and.b32 $0, $0, 0x0f0f0f0f; }"


def _counted(bits: Callable[[float], int], power: int) -> str:
    """Codes of int4 as numbers: in the last bits of a power of two they count from it, and it is taken away.

    Args:
        power: that one whose last bits count ones, so that a code has room below its upper byte.
    """
    pair = "bf16x2" if bits is _bfloat16 else "f16x2"
    upper_byte = bits(power) >> 8
    lines = ["and.b32 lower, $4, 0x0f0f0f0f;", "shr.b32 upper, $4, 4;", "and.b32 upper, upper, 0x0f0f0f0f;"]
    lines += [f"mov.b32 {name}, 0x{2 * f'{bits(value):04x}'};" for name, value in (("minus", -power), ("one", 1))]
    for operand, (codes, picked) in enumerate(product(("upper", "lower"), ("4140", "4342"))):
        lines.append(f"prmt.b32 ${operand}, {codes}, 0x{4 * f'{upper_byte:02x}'}, 0x{picked};")
        lines.append(f"fma.rn.{pair} ${operand}, ${operand}, one, minus;")
    return f"{{ .reg .b32 lower, upper, minus, one; {' '.join(lines)} }}"


def _levels_of_16_bits(levels: Sequence[int]) -> str:
    lines = []
    for half in (0, 1):
        lines += _next_four(half, "$4")
        lines += _looked_up([level >> 8 for level in levels], "h") + _looked_up([level & 255 for level in levels], "l")
        lines += [f"prmt.b32 ${half}, l, h, 0x7351;", f"prmt.b32 ${2 + half}, l, h, 0x6240;"]
    return f"{{ .reg .b32 low3, bit4, upper, a, b, c, d, h, l; {' '.join(lines)} }}"


def _levels_of_8_bits(levels: Sequence[int]) -> str:
    lines = []
    for half in (0, 1):
        lines += _next_four(half, "$2") + _looked_up(levels, f"found{half}")
    lines += ["prmt.b32 $0, found0, found1, 0x7531;", "prmt.b32 $1, found0, found1, 0x6420;"]
    return f"{{ .reg .b32 low3, bit4, upper, a, b, c, d, found0, found1; {' '.join(lines)} }}"


def _next_four(half: int, word: str) -> list[str]:
    """Indices for `_looked_up`, of the word's first or second four codes."""
    if half:
        lines = ["shr.b32 low3, low3, 16;", "shr.b32 bit4, bit4, 16;"]
    else:
        lines = [f"and.b32 low3, {word}, 0x77777777;", f"shr.b32 bit4, {word}, 3;", "and.b32 bit4, bit4, 0x11111111;"]
    return [*lines, "prmt.b32 upper, 0xff00, 0, bit4;"]


def _looked_up(table: Sequence[int], into: str) -> list[str]:
    """Four bytes of a table of 16.

    `prmt` picks 4 bytes of 8 by 4 indices of 3 bits, so each half of the table is looked up, and the code's fourth bit
    decides.
    """
    lines = []
    for half, found in ((table[:8], "a"), (table[8:], "b")):
        low, high = (int.from_bytes(bytes(half[at : at + 4]), "little") for at in (0, 4))
        lines += [f"mov.b32 c, 0x{low:08x};", f"mov.b32 d, 0x{high:08x};", f"prmt.b32 {found}, c, d, low3;"]
    return [*lines, f"lop3.b32 {into}, a, b, upper, 0xd8;"]  # upper ? b : a


def _bfloat16(value: float) -> int:
    """The bits of the nearest one."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _float16(value: float) -> int:
    bits: int = struct.unpack("<H", struct.pack("<e", value))[0]
    return bits
