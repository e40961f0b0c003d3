"""The native library's products with quantized weights (quantized.cpp); the formats are described in quantized.py.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import ctypes
import functools

import torch
from torch import Tensor

from .native import DTYPES, check_outcome, native_available, native_library, native_variant
from .quantized import NF4, form_of, rounds_activations


class _Weight(ctypes.Structure):
    """struct accessory_quantized_weight of quantized.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "table")),
        *((name, ctypes.c_int64) for name in ("experts", "rows", "depth")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("codes", "scale", "zero") for axis in ("expert", "row")),
        ("kind", ctypes.c_int32),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_library()
    weight, pointer = ctypes.POINTER(_Weight), ctypes.c_void_p
    linear = library.accessory_quantized_linear
    linear.restype = ctypes.c_int64
    linear.argtypes = [ctypes.c_char_p, weight, ctypes.c_int, ctypes.c_int, pointer, pointer, pointer]
    linear.argtypes += [ctypes.c_int64, ctypes.c_int]
    library.accessory_dequantize.restype = ctypes.c_int64
    library.accessory_dequantize.argtypes = [ctypes.c_char_p, weight, ctypes.c_int, pointer, ctypes.c_int]
    return library


@functools.cache
def _table(form: str) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * 16)(*(NF4 if form == "nf4" else range(16)))


def quantized_product(
    x_PD: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    expert_P: Tensor | None,
    *,
    variant: str | None = None,
) -> Tensor:
    """y[p] = w[expert[p]] @ x[p] by the native library, for a weight (E, R, D); no expert_P: all are 0.

    The caller has checked shapes, dtypes and strides (`native_serves`).
    """
    x_PD = x_PD.contiguous()
    expert_P = None if expert_P is None else expert_P.contiguous()
    y_PR = x_PD.new_empty(x_PD.shape[0], codes.shape[1])
    outcome = _library().accessory_quantized_linear(
        (variant or native_variant()).encode(),
        _described(codes, scale, zero),
        rounds_activations(x_PD.dtype, codes, zero),
        x_PD.dtype == torch.bfloat16,
        x_PD.data_ptr(),
        None if expert_P is None else expert_P.data_ptr(),
        y_PR.data_ptr(),
        x_PD.shape[0],
        torch.get_num_threads(),
    )
    check_outcome(outcome, expert_P, codes.shape[0])
    return y_PR


def native_values(
    codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor, *, variant: str | None = None
) -> Tensor:
    """The plain values of a weight (E, R, D), written to the contiguous ``out`` by the native library."""
    outcome = _library().accessory_dequantize(
        (variant or native_variant()).encode(),
        _described(codes, scale, zero),
        out.dtype == torch.bfloat16,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check_outcome(outcome, None, codes.shape[0])
    return out


def native_serves(dtype: torch.dtype, codes: Tensor, scale: Tensor, zero: Tensor | None) -> bool:
    """Whether the native library multiplies such weights with activations of this dtype."""
    # Integer sums of a longer row would not fit 32 bits.
    short = codes.dtype != torch.int8 or codes.shape[-1] < 2**17
    return (
        dtype in DTYPES
        and short
        and codes.is_cpu
        and codes.stride(-1) == scale.stride(-1) == 1
        and (zero is None or zero.stride(-1) == 1)
        and native_available()
    )


def _described(codes: Tensor, scale: Tensor, zero: Tensor | None) -> _Weight:
    form = form_of(codes, zero)
    depth = codes.shape[2] * (1 if form == "int8" else 2)
    kind = {"int8": 0, "int4": 1 if depth == 32 * scale.shape[2] else 2, "nf4": 3}[form]
    codes_strides, (expert, row, _), size = codes.stride(), scale.stride(), scale.element_size()
    zero_strides = (0, 0) if zero is None else zero.stride()[:2]
    return _Weight(
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        ctypes.addressof(_table(form)),
        codes.shape[0],
        codes.shape[1],
        depth,
        *codes_strides[:2],
        expert * size,
        row * size,
        *zero_strides,
        kind,
    )
