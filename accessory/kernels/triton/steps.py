"""Launching the Triton kernels of what stands between the products of a layer (step_kernels.py).

On tensors of a GPU, or of a CPU in Triton's interpreter. Shape letters as in kernels/steps.py.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..tensors import Routed
from . import products
from .launch import launch, power_of_two

MOST_WIDTH = 16384  # of what one program normalises: it holds all of it in registers
MOST_EXPERTS = 256
_TURNED, _GATED, _SUMMED = 1024, 512, 512  # elements that a program of four warps takes


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels serve such activations."""
    x = tensors[0]
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # Fake tensors and DTensors have no memory of their own to point to.
    same = all(type(other) is Tensor and other.dtype == x.dtype and other.is_cuda for other in tensors)
    return same and x.dtype in products.DTYPES and x.numel() > 0 and products.available()


def norm(x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta (x itself without one) and its norm."""
    width = x.shape[-1]
    x_TD, weight_D = _rows(x.reshape(-1, width)), weight_D.contiguous()
    delta_TD = x_TD if delta is None else _rows(delta.reshape(-1, width))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = y if delta is None else torch.empty_like(y)
    launch(
        _kernels().normalise[(x_TD.shape[0],)],
        x_TD,
        delta_TD,
        weight_D,
        sums,
        y,
        width,
        eps,
        x_TD.stride(0),
        delta_TD.stride(0),
        ADDS=delta is not None,
        WIDTH=power_of_two(width),
        num_warps=4 if width <= 1024 else 8 if width <= 4096 else 16,
    )
    return (x if delta is None else sums), y


def rotate(q_THh: Tensor, k_THh: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """x * cos + x with the two of each pair swapped * sin, of queries and keys; for what it `serves`.

    Args:
        rotation: cosines and sines, float32, each (T, 1, h).
    """
    tokens, q_heads, width = q_THh.shape
    k_heads, pairs = k_THh.shape[1], power_of_two(width // 2)
    q_THh, k_THh = _rows(q_THh), _rows(k_THh)
    turned = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THh, k_THh))
    heads = min(max(1, _TURNED // (2 * pairs)), power_of_two(max(q_heads, k_heads)))
    launch(
        _kernels().turn[(tokens, -(-q_heads // heads) + -(-k_heads // heads))],
        q_THh,
        k_THh,
        *(part.contiguous() for part in rotation),
        *turned,
        q_heads,
        k_heads,
        width,
        *q_THh.stride()[:2],
        *k_THh.stride()[:2],
        HEADS=heads,
        PAIRS=pairs,
        enable_fp_fusion=False,  # products are rounded before they are added, as by the reference
    )
    return turned[0], turned[1]


def route(logits_TE: Tensor, top_k: int, active_T: Tensor | None) -> Routed:
    logits_TE = _rows(logits_TE)
    tokens, experts = logits_TE.shape
    probs_TE, wide_TE = (logits_TE.new_empty(tokens, experts, dtype=torch.float32) for _ in range(2))
    weights_TK = probs_TE.new_empty(tokens, top_k)
    experts_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.int64)
    asked_TK = None if active_T is None else torch.empty_like(experts_TK)
    launch(
        _kernels().route[(tokens,)],
        logits_TE,
        experts_TK if active_T is None else active_T.contiguous().view(torch.uint8),
        weights_TK,
        experts_TK,
        experts_TK if asked_TK is None else asked_TK,
        probs_TE,
        wide_TE,
        experts,
        logits_TE.stride(0),
        ACTIVE=active_T is not None,
        TOP_K=top_k,
        ALL_EXPERTS=power_of_two(experts),
        LIBDEVICE=logits_TE.is_cuda,
        num_warps=1,
    )
    return Routed(weights_TK, experts_TK, probs_TE, wide_TE, asked_TK)


def silu_gate(both_PO: Tensor) -> Tensor:
    both_PO = _rows(both_PO)
    pairs, width = both_PO.shape[0], both_PO.shape[1] // 2
    y_PF = both_PO.new_empty(pairs, width)
    at_once = min(_GATED, power_of_two(width))
    kernel = _kernels().silu_gate[(pairs, -(-width // at_once))]
    launch(kernel, both_PO, y_PF, width, both_PO.stride(0), WIDTH=at_once, LIBDEVICE=both_PO.is_cuda)
    return y_PF


def sum_pairs(y_PD: Tensor, weights_TK: Tensor) -> Tensor:
    y_PD, (tokens, top_k), width = _rows(y_PD), weights_TK.shape, y_PD.shape[1]
    sum_TD = y_PD.new_empty(tokens, width)
    at_once = min(_SUMMED, power_of_two(width))
    kernel = _kernels().sum_pairs[(tokens, -(-width // at_once))]
    launch(kernel, y_PD, weights_TK.contiguous(), sum_TD, width, y_PD.stride(0), TOP_K=top_k, WIDTH=at_once)
    return sum_TD


def _rows(x: Tensor) -> Tensor:
    """With unit stride in the last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _kernels() -> ModuleType:
    from . import step_kernels  # Triton is there: `serves` asked

    return step_kernels
