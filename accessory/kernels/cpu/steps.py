"""The small steps between a layer's products, each in one call of the native library (steps.cpp).

For one token, what PyTorch spends on its operations is many times what their arithmetic takes; for many, they pass over
memory again and again. All steps compute in float32 and round once, and a row's result does not depend on the others.
Their references stand in kernels/steps.py, which asks `serves` first.

Shape letters: T tokens, P pairs of a token and its expert, K pairs of each token, D width, F hidden width of an expert,
O = 2 F, H query heads, N key heads, h width of a head.
"""

import ctypes
import functools

import torch
from torch import Tensor

from ..tensors import Routed, called_directly, shown, whole_tokens
from .library import DTYPES, check_outcome, native_available, native_library, native_variant


def serves(x: Tensor) -> bool:
    """Whether the functions below serve for such a tensor: on CPU, in bfloat16 and float32, without gradients."""
    return not torch.is_grad_enabled() and called_directly(x) and x.dtype in DTYPES and native_available()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, variant: str | None = None) -> Tensor:
    """x / rms(x) * weight over the last axis, in x's shape and dtype, which must be the weight's."""
    if x.shape[-1:] != weight_D.shape or x.dtype != weight_D.dtype:
        raise ValueError(f"weight_D {shown(weight_D)} does not fit x {shown(x)}")
    x, weight_D = x.contiguous(), weight_D.contiguous()
    y = torch.empty_like(x)
    width = weight_D.shape[0]
    addresses = (x.data_ptr(), weight_D.data_ptr(), y.data_ptr())
    rows = x.numel() // max(1, width)
    _call("accessory_rms_norm", variant, x, *addresses, rows, width, eps)
    return y


def route(logits_TE: Tensor, top_k: int, active_T: Tensor | None) -> Routed:
    """The softmax over all experts, the most probable ones and their renormalised weights, all in float32.

    Of equally probable experts the first is taken.

    Args:
        active_T: bool; tokens for which it is False ask no expert, which is -1 in ``asked`` (None: all ask theirs).
    """
    if logits_TE.dim() != 2 or not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"of logits_TE {shown(logits_TE)} no {top_k} experts can be chosen")
    tokens, experts = logits_TE.shape
    if active_T is not None and (active_T.shape != (tokens,) or active_T.dtype != torch.bool):
        raise ValueError(f"active_T {shown(active_T)} must hold one bool for each row of logits_TE {shown(logits_TE)}")
    logits_TE, active_T = logits_TE.contiguous(), None if active_T is None else active_T.contiguous()
    wide_TE = torch.empty(tokens, experts, dtype=torch.float32)
    weights_TK = torch.empty(tokens, top_k, dtype=torch.float32)
    experts_TK = torch.empty(tokens, top_k, dtype=torch.int64)
    probs_TE, asked_TK = torch.empty_like(wide_TE), torch.empty_like(experts_TK)
    _library().accessory_choose_experts(
        logits_TE.dtype == torch.bfloat16,
        logits_TE.data_ptr(),
        None if active_T is None else active_T.data_ptr(),
        wide_TE.data_ptr(),
        probs_TE.data_ptr(),
        weights_TK.data_ptr(),
        experts_TK.data_ptr(),
        asked_TK.data_ptr(),
        tokens,
        experts,
        top_k,
        torch.get_num_threads(),
    )
    return Routed(weights_TK, experts_TK, probs_TE, wide_TE, None if active_T is None else asked_TK)


def rotate(
    q_THh: Tensor, k_TNh: Tensor, rotation: tuple[Tensor, Tensor], *, variant: str | None = None
) -> tuple[Tensor, Tensor]:
    """Turn the pairs (2i, 2i+1) of every head by the token's angles; q and k may be overwritten.

    Args:
        rotation: float32, each (T, 1, h): every pair's cosine twice, and its sine, negative for the first of them.
    """
    q_THh, k_TNh = whole_tokens(q_THh), whole_tokens(k_TNh)
    cos, sin = (x.contiguous() for x in rotation)
    tokens, heads, width = q_THh.shape
    fits = k_TNh.shape[::2] == (tokens, width) and k_TNh.dtype == q_THh.dtype and width % 2 == 0
    if not fits or any(x.shape != (tokens, 1, width) or x.dtype != torch.float32 for x in (cos, sin)):
        raise ValueError(f"q {shown(q_THh)}, k {shown(k_TNh)}, cosines {shown(cos)} and sines {shown(sin)} do not fit")
    size = q_THh.element_size()
    addresses = (q_THh.data_ptr(), k_TNh.data_ptr(), cos.data_ptr(), sin.data_ptr())
    sizes = (tokens, heads, k_TNh.shape[1], width, q_THh.stride(0) * size, k_TNh.stride(0) * size)
    _call("accessory_rotate", variant, q_THh, *addresses, *sizes)
    return q_THh, k_TNh


def silu_gate(both_PO: Tensor, *, variant: str | None = None) -> Tensor:
    """silu(first half) * second half of every row; (P, F)."""
    if both_PO.dim() != 2 or both_PO.shape[1] % 2:
        raise ValueError(f"both_PO {shown(both_PO)} are not rows of two halves")
    both_PO = both_PO.contiguous()
    pairs, hidden = both_PO.shape[0], both_PO.shape[1] // 2
    hidden_PF = both_PO.new_empty(pairs, hidden)
    _call("accessory_gate", variant, both_PO, both_PO.data_ptr(), hidden_PF.data_ptr(), pairs, hidden)
    return hidden_PF


def sum_pairs(y_PD: Tensor, weights_TK: Tensor, *, variant: str | None = None) -> Tensor:
    """Each token's rows by their float32 weights, (T, D) in y's dtype; the rows of a token stand one after another."""
    if weights_TK.dim() != 2 or y_PD.dim() != 2 or y_PD.shape[0] != weights_TK.numel():
        raise ValueError(f"weights_TK {shown(weights_TK)} do not fit y_PD {shown(y_PD)}")
    if weights_TK.dtype != torch.float32:
        raise ValueError(f"weights_TK {shown(weights_TK)} must be in float32")
    y_PD, weights_TK = y_PD.contiguous(), weights_TK.contiguous()
    (tokens, count), width = weights_TK.shape, y_PD.shape[1]
    out_TD = y_PD.new_empty(tokens, width)
    addresses = (y_PD.data_ptr(), weights_TK.data_ptr(), out_TD.data_ptr())
    _call("accessory_weighted_sum", variant, y_PD, *addresses, tokens, count, width)
    return out_TD


def _call(name: str, variant: str | None, x: Tensor, *arguments: float) -> None:
    chosen, bf16 = (variant or native_variant()).encode(), x.dtype == torch.bfloat16
    check_outcome(getattr(_library(), name)(chosen, bf16, *arguments, torch.get_num_threads()), None, 0)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_library()
    size = ctypes.c_int64
    for name, pointers, rest in (
        ("accessory_rms_norm", 3, [size, size, ctypes.c_float]),
        ("accessory_rotate", 4, [size] * 6),
        ("accessory_gate", 2, [size] * 2),
        ("accessory_weighted_sum", 3, [size] * 3),
    ):
        function = getattr(library, name)
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * pointers, *rest, ctypes.c_int]
    library.accessory_choose_experts.restype = ctypes.c_int64
    library.accessory_choose_experts.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 7, *[size] * 3, ctypes.c_int]
    return library
