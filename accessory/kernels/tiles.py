"""The native library's products of many tokens by the tiles of AMX, with plain weights (tiles.cpp) and quantized ones
(tiles_int8.cpp).

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import ctypes
import functools

import torch
from torch import Tensor

from .native import check_outcome, named_variant, native_available, native_library
from .quantized_native import NativeWeight


@functools.cache
def tiles_serve() -> bool:
    """Whether `tiled_product` does: on a CPU with AMX, where no variant was named."""
    return native_available() and named_variant() == "auto" and bool(_library().accessory_has_tiles())


def tiled_product(x_PD: Tensor, w_ERD: Tensor, offsets_E: Tensor | None) -> Tensor:
    """Rows [offsets[e-1], offsets[e]) of x times expert e's matrix transposed, (P, R), all in bfloat16; see tiles.cpp.

    What is behind the last offset is unset. The caller has asked `tiles_serve`, and has checked shapes and dtypes, and
    that the last axis of the weight has unit stride.

    Args:
        offsets_E: int32; None: all rows are expert 0's.
    """
    x_PD, offsets_E = x_PD.contiguous(), _ends(x_PD, offsets_E)
    experts, rows, depth = w_ERD.shape
    y_PR = x_PD.new_empty(x_PD.shape[0], rows)
    outcome = _library().accessory_tiled_linear(
        x_PD.data_ptr(),
        w_ERD.data_ptr(),
        offsets_E.data_ptr(),
        y_PR.data_ptr(),
        *(experts, rows, depth, *w_ERD.stride()[:2]),
        torch.get_num_threads(),
    )
    check_outcome(outcome, None, experts)
    return y_PR


def tiled_quantized_product(x_PD: Tensor, weight: NativeWeight, offsets_E: Tensor | None) -> Tensor:
    """The same with a quantized weight, in products of 8-bit integers; see tiles_int8.cpp."""
    x_PD, offsets_E = x_PD.contiguous(), _ends(x_PD, offsets_E)
    y_PR = x_PD.new_empty(x_PD.shape[0], weight.rows)
    outcome = _library().accessory_tiled_quantized_linear(
        weight.reference, x_PD.data_ptr(), offsets_E.data_ptr(), y_PR.data_ptr(), torch.get_num_threads()
    )
    check_outcome(outcome, None, weight.experts)
    return y_PR


def _ends(x_PD: Tensor, offsets_E: Tensor | None) -> Tensor:
    return torch.tensor([x_PD.shape[0]], dtype=torch.int32) if offsets_E is None else offsets_E.contiguous()


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_library()
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.accessory_tiled_linear.restype = size
    library.accessory_tiled_linear.argtypes = [*[pointer] * 4, *[size] * 5, ctypes.c_int]
    library.accessory_tiled_quantized_linear.restype = size
    library.accessory_tiled_quantized_linear.argtypes = [*[pointer] * 4, ctypes.c_int]
    return library
