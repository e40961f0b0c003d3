"""Triton kernels around the products: inputs as these read them, shares that are added up, and weights made plain.

Arguments and shape letters as in multiply.py.
"""

import triton
import triton.language as tl


@triton.jit
def split_inputs(
    x_PD: tl.tensor,
    y_PD: tl.tensor,
    sum_PG: tl.tensor,
    pairs: tl.tensor,
    depth: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """The even inputs of all pairs and behind them the odd ones, and the sums of every group, as `multiply` wants them.

    Args:
        x_PD: (P, 2 D).
        y_PD: (2, P, D).
    """
    pair = tl.program_id(0).to(tl.int64)
    group_G = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    some_G = group_G < depth // GROUP
    at_GD = group_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    even_GD = tl.load(x_PD + pair * 2 * depth + 2 * at_GD, some_G[:, None], 0)
    odd_GD = tl.load(x_PD + pair * 2 * depth + 2 * at_GD + 1, some_G[:, None], 0)
    tl.store(y_PD + pair * depth + at_GD, even_GD, some_G[:, None])
    tl.store(y_PD + (pairs + pair) * depth + at_GD, odd_GD, some_G[:, None])
    sum_G = tl.sum(even_GD.to(tl.float32) + odd_GD.to(tl.float32), axis=1)
    tl.store(sum_PG + pair * (depth // GROUP) + group_G, sum_G, some_G)


@triton.jit
def round_inputs(
    x_PD: tl.tensor,
    y_PD: tl.tensor,
    scale_PB: tl.tensor,
    sum_PG: tl.tensor,
    pairs: tl.tensor,
    depth: tl.tensor,
    blocks: tl.tensor,
    x_row: tl.tensor,
    STEP: tl.constexpr,
    HALVES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Activations in 8 bits, as `quantized.round_activations` has them, laid out as `multiply` wants them.

    Args:
        x_PD: a row's elements are neighbours, rows lie x_row apart.
        scale_PB: of a block, times STEP.
        HALVES: even inputs of all pairs first, then the odd ones.
        GROUPS: of a block, whose integers are summed for each.
        BLOCK: elements that share a scale.
    """
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at_N = block * BLOCK + tl.arange(0, BLOCK)
    own_N = tl.load(x_PD + pair * x_row + at_N, at_N < depth, 0).to(tl.float32)
    finite_N = tl.abs(own_N) < float("inf")  # and not NaN, for which no integer stands: then the scale is NaN
    own_N = tl.where(finite_N, own_N, 0)
    largest = tl.max(tl.abs(own_N), axis=0)
    full = tl.full((), 127.0, tl.float32)
    inverse = tl.where(largest > 1e-36, tl.math.div_rn(full, tl.maximum(largest, 1e-36)), 0.0)
    # Added to 1.5 * 2**23, a number is rounded to an integer, to the even one from the middle.
    rounded_N = (own_N * inverse + 12582912.0) - 12582912.0
    scale = tl.where(tl.min(finite_N.to(tl.int32), axis=0) == 1, tl.math.div_rn(largest, full) * STEP, float("nan"))
    tl.store(scale_PB + pair * blocks + block, scale)
    if HALVES:
        half = depth // 2
        to_N = (at_N % 2) * (pairs * half) + pair * half + at_N // 2
        groups = depth // (BLOCK // GROUPS)
        group_G = block * GROUPS + tl.arange(0, GROUPS)
        sum_G = tl.sum(tl.reshape(rounded_N, (GROUPS, BLOCK // GROUPS)), axis=1)
        tl.store(sum_PG + pair * groups + group_G, sum_G, group_G < groups)
    else:
        to_N = pair * depth + at_N
    tl.store(y_PD + to_N, rounded_N.to(tl.int8), at_N < depth)


@triton.jit
def add_shares(part_SN: tl.tensor, y_N: tl.tensor, shares: tl.tensor, size: tl.tensor, SIZE: tl.constexpr) -> None:
    """The sum of the float32 sums that programs of `multiply` made of their parts of the depth."""
    at_N = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    sums_N = tl.zeros((SIZE,), tl.float32)
    for share in range(shares):
        sums_N += tl.load(part_SN + share * size + at_N, at_N < size, 0)
    tl.store(y_N + at_N, sums_N.to(y_N.dtype.element_ty), at_N < size)


@triton.jit
def make_plain(
    w_RD: tl.tensor,
    scale_RG: tl.tensor,
    zero_RG: tl.tensor,
    table: tl.tensor,
    y_RD: tl.tensor,
    rows: tl.tensor,
    depth: tl.tensor,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """The plain weight of codes, scales and zero points that are all contiguous; arguments as `multiply`'s."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_D = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    some_R, some_D = row_R < rows, at_D < depth
    some_RD = some_R[:, None] & some_D[None, :]
    codes_RD = tl.load(w_RD + row_R[:, None] * depth + at_D[None, :], some_RD, 0)
    if FORM == "int8":
        values_RD = codes_RD.to(tl.float32) * tl.load(scale_RG + row_R, some_R, 0)[:, None]
        tl.store(y_RD + row_R[:, None] * depth + at_D[None, :], values_RD.to(y_RD.dtype.element_ty), some_RD)
    else:
        groups = depth // GROUP
        at_G = tl.program_id(1) * (DEPTH // GROUP) + tl.arange(0, DEPTH // GROUP)
        at_RG, some_RG = row_R[:, None] * groups + at_G[None, :], some_R[:, None] & (at_G < groups)[None, :]
        scale_RG = tl.load(scale_RG + at_RG, some_RG, 0).to(tl.float32)
        scale_RD = _for_its_group(scale_RG, ROWS, DEPTH, GROUP)
        if FORM == "int4":
            zero_RD = _for_its_group(tl.load(zero_RG + at_RG, some_RG, 0).to(tl.float32) * 0.0625, ROWS, DEPTH, GROUP)
            even_RD = ((codes_RD >> 4).to(tl.float32) - zero_RD) * scale_RD
            odd_RD = ((codes_RD & 15).to(tl.float32) - zero_RD) * scale_RD
        else:
            even_RD = tl.load(table + (codes_RD >> 4)) * scale_RD
            odd_RD = tl.load(table + (codes_RD & 15)) * scale_RD
        at_D = tl.program_id(1) * 2 * DEPTH + tl.arange(0, 2 * DEPTH)
        values_RD = tl.reshape(tl.join(even_RD, odd_RD), (ROWS, 2 * DEPTH)).to(y_RD.dtype.element_ty)
        some_RD = some_R[:, None] & (at_D < 2 * depth)[None, :]
        tl.store(y_RD + row_R[:, None] * (2 * depth) + at_D[None, :], values_RD, some_RD)


@triton.jit
def _for_its_group(values_RG: tl.tensor, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """The value of its group for every byte of a tile; (R, G) to (R, D)."""
    return tl.reshape(tl.broadcast_to(values_RG[:, :, None], (ROWS, DEPTH // GROUP, GROUP)), (ROWS, DEPTH))
