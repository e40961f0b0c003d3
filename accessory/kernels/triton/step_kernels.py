"""Triton kernels for what stands between the products of a layer, launched by steps.py.

In decoding each of these steps moves a few kB, and starting it takes longer than that: what PyTorch does by several
operations is one kernel here. Arithmetic is float32, rounded where PyTorch's operations round.

Arguments are pointers with the shape letters of what they point to, then sizes, then strides in elements. The last
axis of every tensor has unit stride, and what is written is contiguous. No size counts tokens, which the grid does, so
that their number makes no new variant of a kernel.

Shape letters: T tokens, D model width, H heads, h width of a head, E experts, K experts chosen for each token, P pairs
of a token and its expert, F hidden width of an expert, O = 2 F; in a program D, H and F are what it takes at a time.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def normalise(
    x_TD: tl.tensor,
    delta_TD: tl.tensor,
    weight_D: tl.tensor,
    sum_TD: tl.tensor,
    y_TD: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    x_token: tl.tensor,
    delta_token: tl.tensor,
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """x / rms(x) * weight, of one token; with ADDS of x + delta, which is written as well."""
    token = tl.program_id(0).to(tl.int64)
    at_D = tl.arange(0, WIDTH)
    some_D = at_D < width
    x_D = tl.load(x_TD + token * x_token + at_D, some_D, 0)
    scale_D = tl.load(weight_D + at_D, some_D, 0).to(tl.float32)
    if ADDS:
        delta_D = tl.load(delta_TD + token * delta_token + at_D, some_D, 0)
        x_D = (x_D.to(tl.float32) + delta_D.to(tl.float32)).to(x_D.dtype)
        tl.store(sum_TD + token * width + at_D, x_D, some_D)
    wide_D = x_D.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide_D * wide_D, axis=0) / width + eps)
    tl.store(y_TD + token * width + at_D, (wide_D * inverse * scale_D).to(x_D.dtype), some_D)


@triton.jit
def turn(
    q_THh: tl.tensor,
    k_THh: tl.tensor,
    cos_Th: tl.tensor,
    sin_Th: tl.tensor,
    turned_q_THh: tl.tensor,
    turned_k_THh: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    width: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """x * cos + x with each pair swapped * sin, of some heads of one token: first those of q, then those of k."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos_h, sin_h = cos_Th + token * width, sin_Th + token * width
    q_blocks = tl.cdiv(q_heads, HEADS)
    if block < q_blocks:
        x_Hh, y_Hh = q_THh + token * q_token, turned_q_THh + token * q_heads * width
        _turn_heads(x_Hh, cos_h, sin_h, y_Hh, block, q_heads, width, q_head, HEADS, PAIRS)
    else:
        x_Hh, y_Hh = k_THh + token * k_token, turned_k_THh + token * k_heads * width
        _turn_heads(x_Hh, cos_h, sin_h, y_Hh, block - q_blocks, k_heads, width, k_head, HEADS, PAIRS)


@triton.jit
def _turn_heads(
    x_Hh: tl.tensor,
    cos_h: tl.tensor,
    sin_h: tl.tensor,
    y_Hh: tl.tensor,
    block: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    x_head: tl.tensor,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    head_H = block * HEADS + tl.arange(0, HEADS)
    at_h = tl.arange(0, 2 * PAIRS)
    some_Hh = (head_H < heads)[:, None] & (at_h < width)[None, :]
    own_Hh = tl.load(x_Hh + head_H.to(tl.int64)[:, None] * x_head + at_h[None, :], some_Hh, 0)
    # Read for every head anew: that spares the way through shared memory.
    same_Hh = tl.zeros((HEADS, 1), tl.int32) + at_h[None, :]
    cos_Hh, sin_Hh = tl.load(cos_h + same_Hh, some_Hh, 0), tl.load(sin_h + same_Hh, some_Hh, 0)
    wide_Hh = own_Hh.to(tl.float32)
    first_HI, second_HI = tl.split(tl.reshape(wide_Hh, (HEADS, PAIRS, 2)))
    swapped_Hh = tl.reshape(tl.join(second_HI, first_HI), (HEADS, 2 * PAIRS))
    turned_Hh = wide_Hh * cos_Hh + swapped_Hh * sin_Hh
    tl.store(y_Hh + head_H[:, None] * width + at_h[None, :], turned_Hh.to(own_Hh.dtype), some_Hh)


# A slice of the tokens that count may begin anywhere, and a new variant must not be compiled while a step is captured.
@triton.jit(do_not_specialize_on_alignment=["active_T"])
def route(
    logits_TE: tl.tensor,
    active_T: tl.tensor,
    weights_TK: tl.tensor,
    experts_TK: tl.tensor,
    asked_TK: tl.tensor,
    probs_TE: tl.tensor,
    wide_TE: tl.tensor,
    experts: tl.tensor,
    logits_token: tl.tensor,
    ACTIVE: tl.constexpr,
    TOP_K: tl.constexpr,
    ALL_EXPERTS: tl.constexpr,
    LIBDEVICE: tl.constexpr,
) -> None:
    """The most probable experts of one token, which are renormalised; among equals the lower number comes first.

    Args:
        active_T: bytes; with ACTIVE, 0 stands for a token that is given to no expert, -1 in `asked_TK`.
        wide_TE: the logits in float32.
        ALL_EXPERTS: a power of two that is not below the number of experts.
    """
    token = tl.program_id(0).to(tl.int64)
    at_E = tl.arange(0, ALL_EXPERTS)
    some_E = at_E < experts
    logit_E = tl.load(logits_TE + token * logits_token + at_E, some_E, float("-inf")).to(tl.float32)
    exp_E = tl.where(some_E, _exp(logit_E - tl.max(logit_E, axis=0), LIBDEVICE), 0)
    prob_E = tl.div_rn(exp_E, tl.sum(exp_E, axis=0))
    tl.store(wide_TE + token * experts + at_E, logit_E, some_E)
    tl.store(probs_TE + token * experts + at_E, prob_E, some_E)
    # What is not a number is the greatest, as for torch.topk; compared as it is, it would never be found.
    left_E = tl.where(some_E, tl.where(prob_E == prob_E, prob_E, float("inf")), -1)
    place_E = tl.full((ALL_EXPERTS,), -1, tl.int32)
    for place in range(TOP_K):
        best_E = at_E == tl.argmax(left_E, axis=0)
        place_E = tl.where(best_E, place, place_E)
        left_E = tl.where(best_E, -1, left_E)
    chosen_E = place_E >= 0
    weight_E = tl.div_rn(prob_E, tl.sum(tl.where(chosen_E, prob_E, 0), axis=0))
    at_K = token * TOP_K + place_E
    tl.store(weights_TK + at_K, weight_E, chosen_E)
    tl.store(experts_TK + at_K, at_E.to(tl.int64), chosen_E)
    if ACTIVE:
        asked_E = tl.where(tl.load(active_T + token) != 0, at_E, -1)
        tl.store(asked_TK + at_K, asked_E.to(tl.int64), chosen_E)


@triton.jit
def silu_gate(
    both_PO: tl.tensor,
    y_PF: tl.tensor,
    width: tl.tensor,
    both_pair: tl.tensor,
    WIDTH: tl.constexpr,
    LIBDEVICE: tl.constexpr,
) -> None:
    """silu(first half) * second half, of a part of one pair."""
    pair = tl.program_id(0).to(tl.int64)
    at_F = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    some_F = at_F < width
    gate_F = tl.load(both_PO + pair * both_pair + at_F, some_F, 0)
    up_F = tl.load(both_PO + pair * both_pair + width + at_F, some_F, 0)
    wide_F = gate_F.to(tl.float32)
    silu_F = tl.div_rn(wide_F, 1 + _exp(-wide_F, LIBDEVICE)).to(gate_F.dtype)
    y_F = silu_F.to(tl.float32) * up_F.to(tl.float32)
    tl.store(y_PF + pair * width + at_F, y_F.to(gate_F.dtype), some_F)


@triton.jit
def sum_pairs(
    y_PD: tl.tensor,
    weights_TK: tl.tensor,
    sum_TD: tl.tensor,
    width: tl.tensor,
    y_pair: tl.tensor,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """What a token's pairs say times their weights, added up; a part of one token."""
    token = tl.program_id(0).to(tl.int64)
    at_D = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    some_D = at_D < width
    sum_D = tl.zeros((WIDTH,), tl.float32)
    for place in range(TOP_K):
        pair = token * TOP_K + place
        own_D = tl.load(y_PD + pair * y_pair + at_D, some_D, 0).to(tl.float32)
        sum_D += tl.load(weights_TK + pair) * own_D
    tl.store(sum_TD + token * width + at_D, sum_D.to(sum_TD.dtype.element_ty), some_D)


@triton.jit
def _exp(x: tl.tensor, LIBDEVICE: tl.constexpr) -> tl.tensor:
    """As exact as PyTorch's: Triton's own loses a few of float32's bits. The interpreter knows no libdevice."""
    if LIBDEVICE:
        return libdevice.exp(x)
    else:
        return tl.exp(x)
