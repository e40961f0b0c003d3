"""Triton kernels for quantized weights and activations in 8 bits, as quantized.cpp has them: few tokens in bfloat16.

A code of 4 bits is an integer after one instruction or two, where a float takes four; sums of codes and activations are
exact. Arguments and shape letters as in multiply.py, and B blocks of activations that share a scale.
"""

import triton
import triton.language as tl

from .multiply import _load, _program, _scales, _share, _store, _sums


@triton.jit
def multiply(
    x_PD: tl.tensor,
    x_scale_PB: tl.tensor,
    x_sum_PG: tl.tensor,
    w_ERD: tl.tensor,
    scale_ERG: tl.tensor,
    zero_ERG: tl.tensor,
    table: tl.tensor,
    index: tl.tensor,
    y_PR: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    rows: tl.tensor,
    depth: tl.tensor,
    blocks: tl.tensor,
    w_expert: tl.tensor,
    w_row: tl.tensor,
    scale_expert: tl.tensor,
    scale_row: tl.tensor,
    scale_group: tl.tensor,
    zero_expert: tl.tensor,
    zero_row: tl.tensor,
    zero_group: tl.tensor,
    WAY: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    PTX: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """y[p] = w[expert of p] @ x[p].

    Args:
        x_PD: int8, and for two codes in a byte the even inputs of all pairs and behind them the odd ones, (2, P, D).
        x_scale_PB: float32; a block is BLOCK of the depth, a multiple of GROUP.
        x_sum_PG: float32, sums of a group's integers; for "int4".
        table: int8, the levels of nf4 in steps.
        WAY: "dense" or "gathered".
        FORM: "int8", "int4" or "nf4".
        GROUP: of the depth that shares a scale; for "int8", whose rows have one, as BLOCK.
        PTX: of `ptx.to_integers`, or "" in the interpreter.
    """
    row_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert, pair_P, chosen_P, own_P = _program(index, pairs, experts, WAY, 1, PAIRS)
    first, end = _share(tl.max(own_P.to(tl.int32), axis=0) > 0, depth, DEPTH)
    read_R = tl.minimum(row_R, rows - 1).to(tl.int64)
    read_P = tl.minimum(pair_P, pairs - 1).to(tl.int64)
    x_P = x_PD + read_P * depth
    x_scale_P = x_scale_PB + read_P * blocks
    x_sum_P = x_sum_PG + read_P * (depth // GROUP)
    w_R = w_ERD + expert * w_expert + read_R * w_row
    scale_R = scale_ERG + expert * scale_expert + read_R * scale_row
    zero_R = zero_ERG + expert * zero_expert + read_R * zero_row
    sums_RP = tl.zeros((ROWS, PAIRS), tl.float32)
    if FORM != "int8":
        ahead = _scales(first, depth, scale_R, scale_group, zero_R, zero_group, FORM, GROUP, DEPTH)
    for begin in range(first, end, DEPTH):
        if FORM != "int8":
            scales = ahead
            ahead = _scales(begin + DEPTH, depth, scale_R, scale_group, zero_R, zero_group, FORM, GROUP, DEPTH)
        for part in tl.static_range(DEPTH // GROUP):
            at = begin + part * GROUP
            at_D = at + tl.arange(0, GROUP)
            if not WHOLE_TILES:  # behind the end activations are zeros, and so may be read from anywhere near
                at = tl.minimum(at, (depth - 1) // GROUP * GROUP)
            w_RD = _load(w_R[:, None] + at_D[None, :], (at_D < depth)[None, :], WHOLE_TILES)
            own_PD = _load(x_P[:, None] + at_D[None, :], (at_D < depth)[None, :], WHOLE_TILES)
            own_scale_P = tl.load(x_scale_P + at // BLOCK)
            if FORM == "int8":
                part_RP = tl.dot(w_RD, tl.trans(own_PD)).to(tl.float32)
            else:
                odd_PD = _load(x_P[:, None] + (pairs * depth + at_D)[None, :], (at_D < depth)[None, :], WHOLE_TILES)
                if FORM == "int4":
                    all_P = _sums(x_sum_P, begin // GROUP + part, depth // GROUP, WHOLE_TILES)
                even_RD, odd_RD = _integers(w_RD, table, FORM, PTX)
                whole_RP = tl.dot(even_RD, tl.trans(own_PD))
                part_RP = tl.dot(odd_RD, tl.trans(odd_PD), whole_RP, out_dtype=tl.int32).to(tl.float32)
                if FORM == "int4":
                    part_RP -= scales[part][1].to(tl.float32)[:, None] * 0.0625 * all_P[None, :]
                part_RP *= scales[part][0].to(tl.float32)[:, None]
            sums_RP += part_RP * own_scale_P[None, :]
    if FORM == "int8":
        sums_RP *= tl.load(scale_R)[:, None]
    _store(sums_RP, y_PR, pair_P, row_R, chosen_P, own_P, pairs, experts, rows, WAY)


@triton.jit
def _integers(
    codes_RD: tl.tensor, table: tl.tensor, FORM: tl.constexpr, PTX: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """What the upper and the lower codes stand for, int8."""
    if PTX != "":
        return tl.inline_asm_elementwise(PTX, "=r,=r,r", [codes_RD], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    elif FORM == "int4":
        return (codes_RD >> 4).to(tl.int8), (codes_RD & 15).to(tl.int8)
    else:
        return tl.load(table + (codes_RD >> 4)), tl.load(table + (codes_RD & 15))
