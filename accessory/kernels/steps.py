"""What stands between the products of a layer: one kernel for each step, in inference; Triton's on a GPU.

On a CPU it is one of cpu/steps.py. Each function is its reference in PyTorch wherever no kernel serves: with gradients,
where torch.compile traces, on another device, for other dtypes or sizes, and where Triton or the library is missing.

Shape letters: T tokens, D model width, H heads (of queries or of keys), h width of a head, E experts, K experts chosen
for each token, P = T * K pairs of a token and its expert, F hidden width of an expert, O = 2 F.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import products as products_on_cpu
from .cpu import steps as on_cpu
from .products import check_gathered, gathered_linear, tiles_multiply
from .tensors import Routed, called_directly
from .triton import steps as on_gpu


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, of x's dtype: float32 inside, and rounded once."""
    if on_gpu.serves(x) and x.shape[-1] <= on_gpu.MOST_WIDTH:
        return on_gpu.norm(x, None, weight_D, eps)[1]
    if on_cpu.serves(x):
        return on_cpu.rms_norm(x, weight_D, eps)
    return F.rms_norm(x, x.shape[-1:], weight_D, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and `rms_norm` of it."""
    if on_gpu.serves(x, delta) and x.shape == delta.shape and x.shape[-1] <= on_gpu.MOST_WIDTH:
        return on_gpu.norm(x, delta, weight_D, eps)
    x = x + delta
    return x, rms_norm(x, weight_D, eps)


def rotate(q_THh: Tensor, k_TNh: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Turn the pairs (2i, 2i+1) of every head of queries and keys by the token's angles; computed in float32.

    Args:
        q_THh, k_TNh: new, and nobody else's: they may be overwritten.
        rotation: float32, each (T, 1, h): every pair's cosine twice, and its sine, negative for the first of them.
    """
    if on_gpu.serves(q_THh, k_TNh):
        return on_gpu.rotate(q_THh, k_TNh, rotation)
    if on_cpu.serves(q_THh):
        return on_cpu.rotate(q_THh, k_TNh, rotation)
    # Turned together: for few tokens the number of operations is what counts.
    both = rotate_reference(torch.cat((q_THh, k_TNh), dim=1), rotation)
    q, k = both.split((q_THh.shape[1], k_TNh.shape[1]), dim=1)
    return q, k


def rotate_reference(x_THh: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    wide = x_THh.to(torch.float32, copy=True)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    # In place: on a CPU fresh memory for each intermediate costs more than the arithmetic.
    return wide.mul_(cos).add_(swapped.mul_(sin)).type_as(x_THh)


def route(logits_TE: Tensor, top_k: int, active_T: Tensor | None) -> Routed:
    """Top-k of the softmax over all experts, in float32.

    Args:
        active_T: bool; tokens for which it is False are given to no expert (None: all are given to theirs).
    """
    experts = logits_TE.shape[1]
    if on_gpu.serves(logits_TE) and 0 < top_k <= experts <= on_gpu.MOST_EXPERTS:
        return on_gpu.route(logits_TE, top_k, active_T)
    if on_cpu.serves(logits_TE):
        return on_cpu.route(logits_TE, top_k, active_T)
    logits_TE = logits_TE.float()
    probs_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = probs_TE.topk(top_k, dim=-1)
    asked_TK = None if active_T is None else torch.where(active_T[:, None], experts_TK, -1)
    return Routed(weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK, probs_TE, logits_TE, asked_TK)


def silu_gate(both_PO: Tensor) -> Tensor:
    """silu(first half) * second half, (P, F); for inference."""
    if on_gpu.serves(both_PO):
        return on_gpu.silu_gate(both_PO)
    if on_cpu.serves(both_PO):
        return on_cpu.silu_gate(both_PO)
    return silu_gate_reference(both_PO)


def gathered_gate(x_TD: Tensor, w_EOD: Tensor, expert_TK: Tensor) -> Tensor:
    """`silu_gate` of `gathered_linear` with each token's experts, (T * K, F); in one pass where AMX's tiles multiply.

    For inference.
    """
    if called_directly(x_TD) and not torch.is_grad_enabled() and tiles_multiply(x_TD, w_EOD):
        check_gathered(x_TD, w_EOD, expert_TK[:, 0])
        return products_on_cpu.gathered_gate(x_TD, w_EOD, expert_TK)
    return silu_gate(gathered_linear(x_TD.repeat_interleave(expert_TK.shape[1], dim=0), w_EOD, expert_TK.flatten()))


def silu_gate_reference(both_PO: Tensor) -> Tensor:
    gate_PF, up_PF = both_PO.chunk(2, dim=-1)
    return F.silu(gate_PF).mul_(up_PF)


def sum_pairs(y_PD: Tensor, weights_TK: Tensor) -> Tensor:
    """What each token's pairs say times their weights (float32), added up in float32; (T, D) of y's dtype."""
    if on_gpu.serves(y_PD) and weights_TK.dtype == torch.float32:
        return on_gpu.sum_pairs(y_PD, weights_TK)
    if on_cpu.serves(y_PD):
        return on_cpu.sum_pairs(y_PD, weights_TK)
    y_TKD = y_PD.unflatten(0, weights_TK.shape)
    # A copy, since the model-parallel ranks sum what an autograd function returns in place, which may be no view.
    return torch.bmm(weights_TK.unsqueeze(1), y_TKD.float()).squeeze(1).to(y_PD.dtype, copy=True)
