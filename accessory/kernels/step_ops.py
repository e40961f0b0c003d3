"""What stands between the products of a layer: one kernel for each step, in inference; Triton's on a GPU.

On a CPU it is one of pointwise. Each function is its plain PyTorch twin wherever no kernel serves: with gradients,
where torch.compile traces, on another device, for other dtypes or sizes, and where Triton or the library is missing.

Shape letters: T tokens, D model width, H heads (of queries or of keys), h width of a head, E experts, K experts chosen
for each token, P = T * K pairs of a token and its expert, F hidden width of an expert, O = 2 F.
"""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, pointwise, triton_products
from .linear import called_directly, check_gathered, gathered_linear, tiles_multiply
from .pointwise import Routed, steps_natively
from .triton_launch import launch, power_of_two

_MOST_WIDTH = 16384  # of what one program normalises: it holds all of it in registers
_MOST_EXPERTS = 256
_TURNED, _GATED, _SUMMED = 1024, 512, 512  # elements that a program of four warps takes


def steps_serve(*tensors: Tensor) -> bool:
    """Whether the kernels serve such activations."""
    x = tensors[0]
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # Fake tensors and DTensors have no memory of their own to point to.
    same = all(type(other) is Tensor and other.dtype == x.dtype and other.is_cuda for other in tensors)
    return same and x.dtype in triton_products.DTYPES and x.numel() > 0 and triton_products.triton_available()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, of x's dtype: float32 inside, and rounded once."""
    if steps_serve(x) and x.shape[-1] <= _MOST_WIDTH:
        return launch_norm(x, None, weight_D, eps)[1]
    if steps_natively(x):
        return pointwise.rms_norm(x, weight_D, eps)
    return F.rms_norm(x, x.shape[-1:], weight_D, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and `rms_norm` of it."""
    if steps_serve(x, delta) and x.shape == delta.shape and x.shape[-1] <= _MOST_WIDTH:
        return launch_norm(x, delta, weight_D, eps)
    x = x + delta
    return x, rms_norm(x, weight_D, eps)


def route(logits_TE: Tensor, top_k: int, active_T: Tensor | None) -> Routed:
    """Top-k of the softmax over all experts, in float32.

    Args:
        active_T: bool; tokens for which it is False are given to no expert (None: all are given to theirs).
    """
    experts = logits_TE.shape[1]
    if steps_serve(logits_TE) and 0 < top_k <= experts <= _MOST_EXPERTS:
        return launch_route(logits_TE, top_k, active_T)
    if steps_natively(logits_TE):
        return pointwise.choose_experts(logits_TE, top_k, active_T)
    logits_TE = logits_TE.float()
    probs_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = probs_TE.topk(top_k, dim=-1)
    asked_TK = None if active_T is None else torch.where(active_T[:, None], experts_TK, -1)
    return Routed(weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK, probs_TE, logits_TE, asked_TK)


def silu_gate(both_PO: Tensor) -> Tensor:
    """silu(first half) * second half, (P, F); for inference."""
    if steps_serve(both_PO):
        return launch_gate(both_PO)
    if steps_natively(both_PO):
        return pointwise.gate(both_PO)
    return silu_gate_reference(both_PO)


def gathered_gate(x_TD: Tensor, w_EOD: Tensor, expert_TK: Tensor) -> Tensor:
    """`silu_gate` of `gathered_linear` with each token's experts, (T * K, F); in one pass where AMX's tiles multiply.

    For inference.
    """
    if called_directly(x_TD) and not torch.is_grad_enabled() and tiles_multiply(x_TD, w_EOD):
        check_gathered(x_TD, w_EOD, expert_TK[:, 0])
        return native.gathered_gate(x_TD, w_EOD, expert_TK)
    return silu_gate(gathered_linear(x_TD.repeat_interleave(expert_TK.shape[1], dim=0), w_EOD, expert_TK.flatten()))


def silu_gate_reference(both_PO: Tensor) -> Tensor:
    gate_PF, up_PF = both_PO.chunk(2, dim=-1)
    return F.silu(gate_PF).mul_(up_PF)


def sum_pairs(y_PD: Tensor, weights_TK: Tensor) -> Tensor:
    """What each token's pairs say times their weights (float32), added up in float32; (T, D) of y's dtype."""
    if steps_serve(y_PD) and weights_TK.dtype == torch.float32:
        return launch_sum(y_PD, weights_TK)
    if steps_natively(y_PD):
        return pointwise.weighted_sum(y_PD, weights_TK)
    y_TKD = y_PD.unflatten(0, weights_TK.shape)
    # A copy, since the model-parallel ranks sum what an autograd function returns in place, which may be no view.
    return torch.bmm(weights_TK.unsqueeze(1), y_TKD.float()).squeeze(1).to(y_PD.dtype, copy=True)


# ---- launches: on tensors of a GPU, or of a CPU in Triton's interpreter --------------------------------------


def launch_norm(x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
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


def turn_heads(q_THh: Tensor, k_THh: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """x * cos + x with the two of each pair swapped * sin, of queries and keys; for what `steps_serve`.

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
        enable_fp_fusion=False,  # products are rounded before they are added, as by the twin
    )
    return turned[0], turned[1]


def launch_route(logits_TE: Tensor, top_k: int, active_T: Tensor | None) -> Routed:
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


def launch_gate(both_PO: Tensor) -> Tensor:
    both_PO = _rows(both_PO)
    pairs, width = both_PO.shape[0], both_PO.shape[1] // 2
    y_PF = both_PO.new_empty(pairs, width)
    at_once = min(_GATED, power_of_two(width))
    kernel = _kernels().silu_gate[(pairs, -(-width // at_once))]
    launch(kernel, both_PO, y_PF, width, both_PO.stride(0), WIDTH=at_once, LIBDEVICE=both_PO.is_cuda)
    return y_PF


def launch_sum(y_PD: Tensor, weights_TK: Tensor) -> Tensor:
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
    from . import triton_steps  # Triton is there: `steps_serve` asked

    return triton_steps
