"""The native library's products of many tokens by the tiles of AMX (tiles.cpp), of plain and of quantized weights.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import ctypes
import functools

import torch
from torch import Tensor

from .native import check_outcome, named_variant, native_available, native_library, native_variant
from .quantized_native import NativeWeight


@functools.cache
def tiles_serve() -> bool:
    """Whether `tiled_product` does: on a CPU with AMX, where no variant was named."""
    return native_available() and named_variant() == "auto" and bool(_library().accessory_has_tiles())


def tiled_product(
    x_PD: Tensor, weight: Tensor | NativeWeight, offsets_E: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """Rows [offsets[e-1], offsets[e]) of x times expert e's matrix transposed, (P, R), all in bfloat16; see tiles.cpp.

    What is behind the last offset is unset. The caller has asked `tiles_serve`, and has checked shapes and dtypes, that
    the last axis of a plain weight (E, R, D) has unit stride, and that ``out`` is contiguous.

    Args:
        offsets_E: int32; None: all rows are expert 0's.
    """
    x_PD = x_PD.contiguous()
    offsets_E = torch.tensor([x_PD.shape[0]], dtype=torch.int32) if offsets_E is None else offsets_E.contiguous()
    if isinstance(weight, Tensor):
        (experts, rows, depth), quantized = weight.shape, None
        at, strides = weight.data_ptr(), weight.stride()[:2]
    else:
        experts, rows, depth, quantized = weight.experts, weight.rows, weight.depth, weight.reference
        at, strides = None, (0, 0)
    y_PR = x_PD.new_empty(x_PD.shape[0], rows) if out is None else out
    outcome = _library().accessory_tiled_linear(
        native_variant().encode(),
        quantized,
        x_PD.data_ptr(),
        at,
        offsets_E.data_ptr(),
        y_PR.data_ptr(),
        *(experts, rows, depth, *strides),
        torch.get_num_threads(),
    )
    check_outcome(outcome, None, experts)
    return y_PR


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_library()
    pointers, sizes = [ctypes.c_void_p] * 5, [ctypes.c_int64] * 5
    library.accessory_tiled_linear.restype = ctypes.c_int64
    library.accessory_tiled_linear.argtypes = [ctypes.c_char_p, *pointers, *sizes, ctypes.c_int]
    return library
