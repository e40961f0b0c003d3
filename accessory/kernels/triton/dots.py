"""Quantized weights times very few activations in 8 bits on GPU: a warp takes some rows, by dot products of bytes.

Tensor cores take 16 pairs at least, and their tiles of a weight go through shared memory, with scales that are waited
for in between. For one token that costs more than reading the weight. Here every thread reads 16 bytes of a row at a
time, all that it needs of a tile before it uses any, and multiplies 4 bytes by 4 in one instruction.

Arguments and shape letters as in integers.py, but W words of 4 bytes along the depth; C chunks of F = 4 words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.quant import QuantizedWeight

from ..activations import ACTIVATION_BLOCK
from .launch import launch, nf4_halves, pointed, round_inputs
from .multiply import _load

_ROWS, _CHUNKS = 8, 32  # of a program, which is one warp: 16 bytes of every row for each of its threads


def multiply_dots(x_PD: Tensor, weight_ERD: QuantizedWeight, index: Tensor | None) -> Tensor:
    """y[p] = w[index[p]] @ x[p], (P, R); without an index all with the first weight.

    Args:
        weight_ERD: with codes `in_chunks`.
    """
    pairs, w_ERW, own = x_PD.shape[0], weight_ERD.codes.view(torch.int32), weight_ERD.format
    experts, rows, words = w_ERW.shape
    in_halves, form = own.in_halves, own.triton
    group = own.group // 8 if in_halves else 1
    ints_PD, x_scale_PB, x_sum_PC = round_inputs(x_PD, own, 16)
    y_PR = unused = x_PD.new_empty(pairs, rows)
    weight, strides = pointed(w_ERW, weight_ERD, unused)
    launch(
        multiply[(pairs, -(-rows // _ROWS))],
        *(ints_PD.view(torch.int32), x_scale_PB, x_sum_PC, *weight),
        nf4_halves(x_PD.device) if form == "nf4" else unused,
        unused if index is None else index.contiguous(),
        *(y_PR, pairs, experts, rows, words, x_scale_PB.shape[1], *strides),
        WAY="dense" if index is None else "gathered",
        FORM=form,
        GROUP=group,
        BLOCK=ACTIVATION_BLOCK // (8 if in_halves else 4),
        WHOLE_TILES=rows % _ROWS == 0 and words % (4 * _CHUNKS) == 0,
        PTX=x_PD.is_cuda,
        ROWS=_ROWS,
        CHUNKS=_CHUNKS,
        num_warps=1,
    )
    return y_PR


@triton.jit
def multiply(
    x_PW: tl.tensor,
    x_scale_PB: tl.tensor,
    x_sum_PC: tl.tensor,
    w_ERW: tl.tensor,
    scale_ERG: tl.tensor,
    zero_ERG: tl.tensor,
    table: tl.tensor,
    index: tl.tensor,
    y_PR: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    rows: tl.tensor,
    words: tl.tensor,
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
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """y[p] = w[expert of p] @ x[p], a pair a program of axis 0.

    Args:
        x_PW: int8 in words, and for two codes in a byte the even inputs of all pairs and behind them the odd ones.
        x_sum_PC: float32, sums of a chunk's integers; for "int4".
        w_ERW: codes in words, a multiple of 4 in a row.
        table: of `nf4_halves`. None of its bytes is negative.
        GROUP, BLOCK: words that share a scale, of the weight (4 or a multiple) and of x.
        WHOLE_TILES: ROWS divides the rows, and CHUNKS the chunks.
        PTX: whether instructions are written in PTX, which the interpreter cannot run.
    """
    pair = tl.program_id(0).to(tl.int64)
    row_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    read_R = row_R.to(tl.int64)
    if not WHOLE_TILES:  # a minimum hides that rows are neighbours, and so that their scales can be read at once
        read_R = tl.minimum(read_R, rows - 1)
    expert, chunks = tl.full((), 0, tl.int64), words // 4
    if WAY == "gathered":
        expert = tl.load(index + pair)
        chunks = tl.where((expert >= 0) & (expert < experts), chunks, 0)
    w_R = w_ERW + expert * w_expert + read_R * w_row
    scale_R = scale_ERG + expert * scale_expert + read_R * scale_row
    zero_R = zero_ERG + expert * zero_expert + read_R * zero_row
    x = x_PW + pair * words
    odd = x + tl.full((), pairs, tl.int64) * words
    x_scale = x_scale_PB + pair * blocks
    x_sum = x_sum_PC + pair * (words // 4)
    word_F = tl.arange(0, 4)
    sums_RC = tl.zeros((ROWS, CHUNKS), tl.float32)
    if FORM == "nf4":
        minus0, minus1, plus0, plus1 = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    for begin in range(0, chunks, CHUNKS):
        at_C = begin + tl.arange(0, CHUNKS)
        at_CF = at_C[:, None] * 4 + word_F[None, :]
        group_C = at_C * 4 // GROUP
        some_C = at_C < chunks
        w_RCF = _load(w_R[:, None, None] + at_CF[None, :, :], some_C[None, :, None], WHOLE_TILES)
        x_CF = _load(x + at_CF, some_C[:, None], WHOLE_TILES)
        x_scale_C = _load(x_scale + at_C * 4 // BLOCK, some_C, WHOLE_TILES)
        if FORM == "int8":
            dots_RCF = _dot(w_RCF, x_CF[None, :, :], 0, PTX)
            sums_RC += tl.sum(dots_RCF, axis=2).to(tl.float32) * x_scale_C[None, :]
        else:
            odd_CF = _load(odd + at_CF, some_C[:, None], WHOLE_TILES)
            scale_RC = _load(scale_R[:, None] + (group_C * scale_group)[None, :], some_C[None, :], WHOLE_TILES)
            if FORM == "int4":
                zero_RC = _load(zero_R[:, None] + (group_C * zero_group)[None, :], some_C[None, :], WHOLE_TILES)
                dots_RCF = _dot((w_RCF >> 4) & 0x0F0F0F0F, x_CF[None, :, :], 0, PTX)
                dots_RCF = _dot(w_RCF & 0x0F0F0F0F, odd_CF[None, :, :], dots_RCF, PTX)
                all_C = _load(x_sum + at_C, some_C, WHOLE_TILES)
                part_RC = tl.sum(dots_RCF, axis=2).to(tl.float32)
                part_RC -= zero_RC.to(tl.float32) * 0.0625 * all_C[None, :]
            else:
                # As the codes of a word lie: lower and upper one of each byte, which are an odd input and an even one.
                first_CF = _pick(odd_CF, x_CF, 0x5140, PTX)[None, :, :]
                last_CF = _pick(odd_CF, x_CF, 0x7362, PTX)[None, :, :]
                # A code's fourth bit makes the pick a sign, here 0: so one of the two halves of the table gives 0.
                flipped_RCF = w_RCF ^ -0x77777778
                below_RCF = _dot(_pick(minus0, minus1, w_RCF, PTX), first_CF, 0, PTX)
                below_RCF = _dot(_pick(minus0, minus1, w_RCF >> 16, PTX), last_CF, below_RCF, PTX)
                above_RCF = _dot(_pick(plus0, plus1, flipped_RCF, PTX), first_CF, 0, PTX)
                above_RCF = _dot(_pick(plus0, plus1, flipped_RCF >> 16, PTX), last_CF, above_RCF, PTX)
                part_RC = tl.sum(above_RCF - below_RCF, axis=2).to(tl.float32)
            sums_RC += part_RC * (scale_RC.to(tl.float32) * x_scale_C[None, :])
    sums_R = tl.sum(sums_RC, axis=1)
    if FORM == "int8":
        sums_R *= tl.load(scale_R, chunks > 0, 0)  # an expert that is not there has no scales to be read
    if WAY == "gathered":
        sums_R = tl.where(expert < experts, sums_R, float("nan"))
    tl.store(y_PR + pair * rows + row_R, sums_R.to(y_PR.dtype.element_ty), row_R < rows)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, c: tl.tensor, PTX: tl.constexpr) -> tl.tensor:
    """c and the sum of the products of the four signed bytes of a and b: `dp4a`."""
    if PTX:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            c += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return c


@triton.jit
def _pick(low: tl.tensor, high: tl.tensor, picks: tl.tensor, PTX: tl.constexpr) -> tl.tensor:
    """`prmt`: for each of the last 4 nibbles of ``picks``, a byte of the 8; where its fourth bit is set, its sign."""
    if PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, picks], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        y = tl.zeros_like(low ^ picks)
        for byte in tl.static_range(4):
            pick = (picks >> (4 * byte)) & 15
            word = tl.where((pick & 4) != 0, high, low)
            found = (word >> (8 * (pick & 3))) & 255
            found = tl.where((pick & 8) != 0, (found >> 7) * 255, found)
            y |= found << (8 * byte)
        return y
