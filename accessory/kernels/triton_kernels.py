"""Triton kernels for few tokens on GPU: the counterparts of native.cpp and quantized.cpp, launched by triton_products.

The only module that imports Triton, which the project does not ask for: PyTorch's builds for GPUs bring it.

A program makes ROWS rows of the result for one pair, or for PAIRS of them where all share the weight. The products of
a pass over the depth are kept apart in float32 and summed once, behind the last. What a program reads of a weight is
decided on the GPU, by the expert of its pair, so no number travels to the host; a negative expert reads nothing.

Arguments are pointers with the shape letters of what they point to, then sizes, then strides in elements. The last
axis of every tensor has unit stride, and x and y are contiguous.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth, C bytes of two
codes, G groups of a row; in a program P, R, D and C are what it takes at a time.
"""

import triton
import triton.language as tl


@triton.jit
def multiply_whole(
    x_PD: tl.tensor,
    w_ERD: tl.tensor,
    scale_ER: tl.tensor,
    expert_P: tl.tensor,
    y_PR: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    rows: tl.tensor,
    depth: tl.tensor,
    w_expert: tl.tensor,
    w_row: tl.tensor,
    scale_expert: tl.tensor,
    scale_row: tl.tensor,
    GATHERED: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Weights of which every element is a number (floats, or int8 with a scale for each row: SCALED)."""
    pair_P, row_R = _place(pairs, PAIRS, ROWS)
    expert, end = _chosen(expert_P, pair_P, experts, depth, GATHERED)
    some_P, some_R = pair_P < pairs, row_R < rows
    x_P = x_PD + pair_P.to(tl.int64) * depth
    w_R = w_ERD + expert * w_expert + row_R.to(tl.int64) * w_row
    sums_PRD = tl.zeros((PAIRS, ROWS, DEPTH), tl.float32)
    for begin in range(0, end, DEPTH):
        at_D = begin + tl.arange(0, DEPTH)
        some_D = at_D < depth
        w_RD = tl.load(w_R[:, None] + at_D[None, :], some_R[:, None] & some_D[None, :], 0).to(tl.float32)
        own_PD = tl.load(x_P[:, None] + at_D[None, :], some_P[:, None] & some_D[None, :], 0).to(tl.float32)
        sums_PRD += own_PD[:, None, :] * w_RD[None, :, :]
    sums_PR = tl.sum(sums_PRD, axis=2)
    if SCALED:
        scale_R = tl.load(scale_ER + expert * scale_expert + row_R * scale_row, some_R & (end > 0), 0)
        sums_PR *= scale_R[None, :]
    _store(sums_PR, y_PR, pair_P, row_R, pairs, rows, expert < experts)


@triton.jit
def multiply_halves(
    x_PD: tl.tensor,
    codes_ERC: tl.tensor,
    scale_ERG: tl.tensor,
    zero_ERG: tl.tensor,
    table: tl.tensor,
    expert_P: tl.tensor,
    y_PR: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    rows: tl.tensor,
    depth: tl.tensor,
    codes_expert: tl.tensor,
    codes_row: tl.tensor,
    scale_expert: tl.tensor,
    scale_row: tl.tensor,
    zero_expert: tl.tensor,
    zero_row: tl.tensor,
    GROUP: tl.constexpr,
    GATHERED: tl.constexpr,
    ZERO: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """Weights of two codes in a byte: int4 with a zero point for each group (ZERO), or nf4 by its table of values."""
    pair_P, row_R = _place(pairs, PAIRS, ROWS)
    expert, end = _chosen(expert_P, pair_P, experts, depth // 2, GATHERED)
    some_P, some_R = pair_P < pairs, row_R < rows
    x_P = x_PD + pair_P.to(tl.int64) * depth
    codes_R = codes_ERC + expert * codes_expert + row_R.to(tl.int64) * codes_row
    scale_R = scale_ERG + expert * scale_expert + row_R.to(tl.int64) * scale_row
    sums_PRC = tl.zeros((PAIRS, ROWS, BYTES), tl.float32)
    for begin in range(0, end, BYTES):
        at_C = begin + tl.arange(0, BYTES)
        some_C = at_C < depth // 2
        group_C = at_C // (GROUP // 2)
        some_RC, some_PC = some_R[:, None] & some_C[None, :], some_P[:, None] & some_C[None, :]
        codes_RC = tl.load(codes_R[:, None] + at_C[None, :], some_RC, 0)
        scale_RC = tl.load(scale_R[:, None] + group_C[None, :], some_RC, 0).to(tl.float32)
        even_RC, odd_RC = codes_RC >> 4, codes_RC & 15
        if ZERO:
            zero_R = zero_ERG + expert * zero_expert + row_R.to(tl.int64) * zero_row
            zero_RC = tl.load(zero_R[:, None] + group_C[None, :], some_RC, 0).to(tl.float32) / 16
            even_RC = even_RC.to(tl.float32) - zero_RC
            odd_RC = odd_RC.to(tl.float32) - zero_RC
        else:
            even_RC = tl.load(table + even_RC)
            odd_RC = tl.load(table + odd_RC)
        x_even_PC = tl.load(x_P[:, None] + 2 * at_C[None, :], some_PC, 0).to(tl.float32)
        x_odd_PC = tl.load(x_P[:, None] + 2 * at_C[None, :] + 1, some_PC, 0).to(tl.float32)
        even_RC *= scale_RC
        odd_RC *= scale_RC
        sums_PRC += x_even_PC[:, None, :] * even_RC[None, :, :] + x_odd_PC[:, None, :] * odd_RC[None, :, :]
    _store(tl.sum(sums_PRC, axis=2), y_PR, pair_P, row_R, pairs, rows, expert < experts)


@triton.jit
def _place(pairs: tl.tensor, PAIRS: tl.constexpr, ROWS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Pairs and rows of this program. Those of one block of rows are neighbours: the cache holds what they share."""
    blocks = tl.cdiv(pairs, PAIRS)
    program = tl.program_id(0)
    pair_P = program % blocks * PAIRS + tl.arange(0, PAIRS)
    return pair_P, program // blocks * ROWS + tl.arange(0, ROWS)


@triton.jit
def _chosen(
    expert_P: tl.tensor, pair_P: tl.tensor, experts: tl.tensor, depth: tl.tensor, GATHERED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The expert, and how far its rows are to be read: not at all where it is none."""
    if GATHERED:
        expert = tl.max(tl.load(expert_P + pair_P), axis=0)  # PAIRS is 1 here
        end = tl.where((expert >= 0) & (expert < experts), depth, 0)
    else:
        expert = tl.full((), 0, tl.int64)
        end = tl.where(expert == 0, depth, 0)
    return expert, end


@triton.jit
def _store(
    sums_PR: tl.tensor,
    y_PR: tl.tensor,
    pair_P: tl.tensor,
    row_R: tl.tensor,
    pairs: tl.tensor,
    rows: tl.tensor,
    exists: tl.tensor,
) -> None:
    """The result; NaN for an expert that does not exist, which the host cannot refuse without waiting for the GPU."""
    sums_PR = tl.where(exists, sums_PR, float("nan"))
    at_PR = pair_P.to(tl.int64)[:, None] * rows + row_R[None, :]
    inside_PR = (pair_P < pairs)[:, None] & (row_R < rows)[None, :]
    tl.store(y_PR + at_PR, sums_PR.to(y_PR.dtype.element_ty), inside_PR)
