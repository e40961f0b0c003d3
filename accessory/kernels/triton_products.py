"""Products of few tokens on GPU: `linear.py`'s and `quantized_ops.py`'s, under their names, by Triton kernels.

Activations stay float, whatever the weight, and sums are float32. The block sizes keep the compiler from spilling
registers (capabilities 8.0 and 9.0); which are fastest was not measured, for want of a GPU.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .quantized import NF4, depth_of, form_of

logger = logging.getLogger("accessory.kernels")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHARED_PAIRS = 4  # tokens that a program multiplies with a weight it has read; more would not fit its registers
_WHOLE = (4, 512)  # rows and elements of each that a program reads at a time
_HALVES = (8, 256)  # the same in bytes of two codes


def triton_available() -> bool:
    """Whether the Triton kernels serve (on GPU, in bfloat16, float16 and float32)."""
    return _kernels() is not None


def triton_serves(x_PD: Tensor, *weight: Tensor | None) -> bool:
    """Whether they serve such activations and the tensors of such a weight."""
    aligned = all(tensor is None or tensor.stride(-1) == 1 for tensor in weight)
    return x_PD.dtype in DTYPES and aligned and triton_available()


def gathered_linear(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor) -> Tensor:
    """y[p] = w[expert[p]] @ x[p], (P, R); a negative expert gives zeros, one that does not exist NaN."""
    return _whole(x_PD, w_ERD, None, expert_P)


def few_token_linear(x_PD: Tensor, w_RD: Tensor) -> Tensor:
    """x @ w.T, (P, R)."""
    return _whole(x_PD, w_RD[None], None, None)


def gathered_quantized_linear(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor
) -> Tensor:
    """`gathered_linear` for a quantized weight (E, R, D)."""
    return _quantized(x_PD, codes, scale, zero, expert_P)


def quantized_linear(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """`few_token_linear` for a quantized weight (R, D)."""
    return _quantized(x_PD, codes[None], scale[None], None if zero is None else zero[None], None)


def _quantized(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor | None) -> Tensor:
    if form_of(codes, zero) == "int8":
        return _whole(x_PD, codes, scale, expert_P)
    return _halves(x_PD, codes, scale, zero, expert_P)


def _whole(x_PD: Tensor, w_ERD: Tensor, scale: Tensor | None, expert_P: Tensor | None) -> Tensor:
    (pairs, depth), (experts, rows, _) = x_PD.shape, w_ERD.shape
    if 0 in (pairs, experts, rows):  # such as a rank without experts
        return x_PD.new_zeros(pairs, rows)
    y_PR = x_PD.new_empty(pairs, rows)
    at_once = _at_once(pairs, expert_P)
    _launch(
        _loaded().multiply_whole[_grid(pairs, rows, at_once, _WHOLE[0])],
        x_PD.contiguous(),
        w_ERD,
        w_ERD if scale is None else scale,
        y_PR if expert_P is None else expert_P.contiguous(),
        y_PR,
        pairs,
        experts,
        rows,
        depth,
        *w_ERD.stride()[:2],
        *((0, 0) if scale is None else scale.stride()[:2]),
        GATHERED=expert_P is not None,
        SCALED=scale is not None,
        PAIRS=at_once,
        ROWS=_WHOLE[0],
        DEPTH=_WHOLE[1],
    )
    return y_PR


def _halves(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor | None) -> Tensor:
    pairs, (experts, rows, _), depth = x_PD.shape[0], codes.shape, depth_of(codes)
    if 0 in (pairs, experts, rows, depth):
        return x_PD.new_zeros(pairs, rows)
    y_PR = x_PD.new_empty(pairs, rows)
    at_once = _at_once(pairs, expert_P)
    _launch(
        _loaded().multiply_halves[_grid(pairs, rows, at_once, _HALVES[0])],
        x_PD.contiguous(),
        codes,
        scale,
        scale if zero is None else zero,
        _nf4_table(codes.device) if zero is None else scale,
        y_PR if expert_P is None else expert_P.contiguous(),
        y_PR,
        pairs,
        experts,
        rows,
        depth,
        *codes.stride()[:2],
        *scale.stride()[:2],
        *((0, 0) if zero is None else zero.stride()[:2]),
        GROUP=depth // scale.shape[-1],
        GATHERED=expert_P is not None,
        ZERO=zero is not None,
        PAIRS=at_once,
        ROWS=_HALVES[0],
        BYTES=_HALVES[1],
    )
    return y_PR


def _launch(kernel: Callable[..., Any], x_PD: Tensor, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(x_PD):  # Triton launches on the current GPU, whichever holds the tensors
        kernel(x_PD, *arguments, **constants)


def _at_once(pairs: int, expert_P: Tensor | None) -> int:
    """Pairs of one program: one where each has an expert of its own, and a power of two otherwise."""
    return 1 if expert_P is not None else min(_SHARED_PAIRS, 1 << (pairs - 1).bit_length())


def _grid(pairs: int, rows: int, at_once: int, rows_at_once: int) -> tuple[int]:
    return (-(-pairs // at_once) * -(-rows // rows_at_once),)


@functools.cache
def _nf4_table(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, so it must serve outside of that mode too
        return torch.tensor(NF4, dtype=torch.float32, device=device)


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of the kernels, imported at the first product; None, said once, where Triton is not installed."""
    try:
        from . import triton_kernels
    except ImportError as error:
        logger.warning("Triton does not load (%s). Decoding on GPU uses PyTorch's slower products.", error)
        return None
    return triton_kernels


def _loaded() -> ModuleType:
    module = _kernels()
    if module is None:
        raise RuntimeError("the Triton kernels need Triton, which is not installed")
    return module
