"""The native library's products with plain weights (products.cpp, tiles.cpp).

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import check_outcome, native_library, native_variant, tiles_serve


def gathered_linear(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor | None, *, variant: str | None = None) -> Tensor:
    """y[p] = w[expert[p]] @ x[p] by the native library; see `kernels.products.gathered_linear`. No expert_P: all are 0.

    The caller has checked shapes and dtypes, and that the last axis of w has unit stride.

    Args:
        variant: one of `VARIANTS`, or "tiles" in bfloat16; None: the best.
    """
    bf16 = x_PD.dtype == torch.bfloat16
    chosen = variant or ("tiles" if bf16 and tiles_serve() else native_variant())
    y_PR = x_PD.new_empty(x_PD.shape[0], w_ERD.shape[1])
    return _gathered(_library().accessory_gathered_linear, (chosen.encode(), bf16), x_PD, w_ERD, expert_P, y_PR)


def gathered_gate(x_TD: Tensor, w_EOD: Tensor, expert_TK: Tensor) -> Tensor:
    """silu(first half) * second half of that product's outputs O with each token's experts, (T * K, O / 2) in bfloat16;
    where `tiles_serve`.
    """
    y_PF = x_TD.new_empty(expert_TK.numel(), w_EOD.shape[1] // 2)
    gate, each = _library().accessory_gathered_gate, expert_TK.shape[1]
    return _gathered(gate, (each,), x_TD, w_EOD, expert_TK.flatten(), y_PF)


def _gathered(
    function: Callable[..., int],
    first: tuple[object, ...],
    x_PD: Tensor,
    w_ERD: Tensor,
    expert_P: Tensor | None,
    y: Tensor,
) -> Tensor:
    x_PD = x_PD.contiguous()
    expert_P = None if expert_P is None else expert_P.contiguous()
    experts, _, depth = w_ERD.shape
    outcome = function(
        *first,
        x_PD.data_ptr(),
        w_ERD.data_ptr(),
        None if expert_P is None else expert_P.data_ptr(),
        y.data_ptr(),
        *(y.shape[0], experts, y.shape[1], depth, *w_ERD.stride()[:2]),
        torch.get_num_threads(),
    )
    check_outcome(outcome, expert_P, experts)
    return y


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_library()
    product, gate = library.accessory_gathered_linear, library.accessory_gathered_gate
    product.restype = gate.restype = ctypes.c_int64
    shared: list[Any] = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 6, ctypes.c_int]
    gate.argtypes = [ctypes.c_int64, *shared]
    product.argtypes = [ctypes.c_char_p, ctypes.c_int, *shared]
    return library
