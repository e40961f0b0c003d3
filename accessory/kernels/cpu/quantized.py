"""The native library's products with quantized weights (quantized.cpp); quant/formats.py describes the formats.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import ctypes
import functools

import torch
from torch import Tensor

from accessory.quant import FORMATS, QuantizedWeight

from ..activations import rounds_activations
from .library import check_outcome, native_available, native_library, native_variant


class _Levels(ctypes.Structure):
    """struct accessory_levels of quantized.cpp."""

    _fields_ = [("values", ctypes.c_float * 16), ("steps", ctypes.c_int8 * 16), ("step", ctypes.c_float)]


class _Weight(ctypes.Structure):
    """struct accessory_quantized_weight of quantized.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "levels")),
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
    tiled = library.accessory_tiled_quantized_linear
    tiled.restype = ctypes.c_int64
    tiled.argtypes = [weight, pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int]
    library.accessory_dequantize.restype = ctypes.c_int64
    library.accessory_dequantize.argtypes = [ctypes.c_char_p, weight, ctypes.c_int, pointer, ctypes.c_int]
    return library


@functools.cache
def _levels(key: str) -> _Levels:
    own = FORMATS[key]
    steps = (round(level / own.step) for level in own.levels)
    return _Levels((ctypes.c_float * 16)(*own.levels), (ctypes.c_int8 * 16)(*steps), own.step)


class NativeWeight:
    """A weight (R, D), or (E, ..., R, D) whose axes between experts and inputs are all rows, as the library reads it.

    It is made of addresses: whoever keeps it must see to it that the tensors' memory stays. `native_weight` makes one.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        self.stacked, own = weight.codes.dim() > 2, weight.format
        if not self.stacked:
            weight = weight.stacked()
        codes, scale, zero = weight.codes, weight.scale, weight.zero
        self.experts, self.rows, self.depth = codes.shape[0], codes.shape[1:-1].numel(), weight.depth
        row, size = codes.dim() - 2, scale.element_size()
        self._struct = _Weight(
            codes.data_ptr(),
            scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            ctypes.addressof(_levels(own.key)),
            self.experts,
            self.rows,
            self.depth,
            codes.stride(0),
            codes.stride(row),
            scale.stride(0) * size,
            scale.stride(row) * size,
            0 if zero is None else zero.stride(0),
            0 if zero is None else zero.stride(row),
            own.kind,
        )
        self.reference = ctypes.byref(self._struct)


def native_weight(weight: QuantizedWeight) -> NativeWeight | None:
    """As the native library reads it, kept by the weight; None where it does not."""
    if "native" not in weight.kept:
        weight.kept["native"] = NativeWeight(weight) if _serves(weight) else None
    native: NativeWeight | None = weight.kept["native"]
    return native


def _serves(weight: QuantizedWeight) -> bool:
    tensors = weight.tensors().values()
    laid_out = weight.codes.dim() >= 2 and all(
        tensor.stride(-1) == 1 and _one_axis_of_rows(tensor) for tensor in tensors
    )
    return laid_out and weight.format.kind is not None and weight.codes.is_cpu and native_available()


def gathered_quantized_linear(
    x_PD: Tensor, weight: NativeWeight, expert_P: Tensor | None, *, variant: str | None = None
) -> Tensor:
    """y[p] = w[expert[p]] @ x[p] by the native library, in x's dtype, one of `DTYPES`; no expert_P: all are 0.

    The caller has checked the shapes of x and expert_P.

    Args:
        variant: one of `library.VARIANTS`, or in bfloat16 "tiles", for many tokens (tiles_int8.cpp); None: the best of
            the former.
    """
    x_PD = x_PD.contiguous()
    expert_P = None if expert_P is None else expert_P.contiguous()
    y_PR = x_PD.new_empty(x_PD.shape[0], weight.rows)
    shared = (
        x_PD.data_ptr(),
        None if expert_P is None else expert_P.data_ptr(),
        y_PR.data_ptr(),
        x_PD.shape[0],
        torch.get_num_threads(),
    )
    if variant == "tiles":
        outcome = _library().accessory_tiled_quantized_linear(weight.reference, *shared)
    else:
        name, bf16 = (variant or native_variant()).encode(), x_PD.dtype == torch.bfloat16
        rounds = rounds_activations(x_PD.dtype)
        outcome = _library().accessory_quantized_linear(name, weight.reference, rounds, bf16, *shared)
    check_outcome(outcome, expert_P, weight.experts)
    return y_PR


def plain_values(weight: NativeWeight, out: Tensor, *, variant: str | None = None) -> Tensor:
    """The plain values of a weight, written to ``out``, contiguous and of one of `DTYPES`, by the native library."""
    outcome = _library().accessory_dequantize(
        (variant or native_variant()).encode(),
        weight.reference,
        out.dtype == torch.bfloat16,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check_outcome(outcome, None, weight.experts)
    return out


def _one_axis_of_rows(tensor: Tensor) -> bool:
    """Whether the axes between the first and the last lie in memory as one."""
    return all(
        tensor.stride(axis) == tensor.stride(axis + 1) * tensor.shape[axis + 1] for axis in range(1, tensor.dim() - 2)
    )
