"""Triton kernels for GPUs: the counterparts of products.cpp and quantized.cpp, launched by products.py.

Triton is imported by the modules here alone, at the first product on a GPU: the project does not ask for it, and
PyTorch's builds for GPUs bring it.

`multiply` reads a tile of a weight once and multiplies it, on the tensor cores, with all tokens of its program. What a
program reads of a weight is decided on the GPU, by the experts of the pairs, so no number travels to the host. Codes
become numbers of x's dtype in registers, and scales are applied to sums: a code is exact in every dtype, a level of nf4
is rounded to it.

Arguments are pointers with the shape letters of what they point to, then sizes, then strides in elements. The last
axis of a weight's codes has unit stride, and x and y are contiguous. A warp reads the scales of 8 rows at once: these
had better be neighbours.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth as it is stored:
elements, or bytes of two codes, G groups of a row; in a program P, R, D and G are what it takes at a time.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(
    x_PD: tl.tensor,
    w_ERD: tl.tensor,
    scale_ERG: tl.tensor,
    zero_ERG: tl.tensor,
    sum_PG: tl.tensor,
    table: tl.tensor,
    index: tl.tensor,
    y_PR: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    rows: tl.tensor,
    depth: tl.tensor,
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
    WHOLE_TILES: tl.constexpr,
    FLOAT32: tl.constexpr,
    PTX: tl.constexpr,
    ALL_EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """y[p] = w[expert of p] @ x[p], summed in float32.

    Args:
        y_PR: or (S, P, R) in float32, where S programs share the depth: the sums of each.
        x_PD: where two codes share a byte, the even inputs of all pairs and behind them the odd ones, (2, P, D).
        sum_PG: sums of a group's inputs, float32.
        table: the levels of nf4, rounded to x's dtype.
        index: the expert of each pair, int64 (WAY "gathered": few pairs in any order, which are all in one tile; a
            negative expert gives zeros, one that does not exist NaN), or where each expert's pairs end, int32
            ("sorted"; pairs behind the last end are left alone); "dense": there is one weight, for all.
        FORM: "plain", "int8", "int4" or "nf4".
        GROUP: bytes that share a scale, for the last two.
        WHOLE_TILES: DEPTH divides the depth.
        FLOAT32: multiply in float32, whatever x's dtype: the interpreter multiplies the bits of bfloat16.
        PTX: of `ptx.to_floats`, or "" for float32 and in the interpreter, which cannot run it.
        ALL_EXPERTS: a power of two that is not below the number of experts.
    """
    row_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert, pair_P, chosen_P, own_P = _program(index, pairs, experts, WAY, ALL_EXPERTS, PAIRS)
    first, end = _share(tl.max(own_P.to(tl.int32), axis=0) > 0, depth, DEPTH)
    # Rows and pairs behind the last one repeat it: that needs no mask, and is not stored.
    read_R = tl.minimum(row_R, rows - 1).to(tl.int64)
    read_P = tl.minimum(pair_P, pairs - 1).to(tl.int64)
    x_P = x_PD + read_P * depth
    odd = tl.full((), pairs, tl.int64) * depth  # to the odd inputs: of a long scoring there are more than 2**31
    sums_P = sum_PG + read_P * (depth // GROUP)
    w_R = w_ERD + expert * w_expert + read_R * w_row
    scale_R = scale_ERG + expert * scale_expert + read_R * scale_row
    zero_R = zero_ERG + expert * zero_expert + read_R * zero_row
    sums_RP = tl.zeros((ROWS, PAIRS), tl.float32)
    if FORM == "int4" or FORM == "nf4":
        ahead = _scales(first, depth, scale_R, scale_group, zero_R, zero_group, FORM, GROUP, DEPTH)
    for begin in range(first, end, DEPTH):
        if FORM == "plain" or FORM == "int8":
            at_D = begin + tl.arange(0, DEPTH)
            w_RD = _load(w_R[:, None] + at_D[None, :], (at_D < depth)[None, :], WHOLE_TILES)
            own_PD = _load(x_P[:, None] + at_D[None, :], (at_D < depth)[None, :], WHOLE_TILES)
            if FLOAT32:
                own_PD = own_PD.to(tl.float32)
            sums_RP = tl.dot(w_RD.to(own_PD.dtype), tl.trans(own_PD), sums_RP, input_precision="ieee")
        else:
            scales = ahead
            ahead = _scales(begin + DEPTH, depth, scale_R, scale_group, zero_R, zero_group, FORM, GROUP, DEPTH)
            for part in tl.static_range(DEPTH // GROUP):
                at_D = begin + part * GROUP + tl.arange(0, GROUP)
                w_RD = _load(w_R[:, None] + at_D[None, :], (at_D < depth)[None, :], WHOLE_TILES)
                even_PD = _load(x_P[:, None] + at_D[None, :], (at_D < depth)[None, :], WHOLE_TILES)
                odd_PD = _load(x_P[:, None] + (odd + at_D)[None, :], (at_D < depth)[None, :], WHOLE_TILES)
                if FLOAT32:
                    even_PD, odd_PD = even_PD.to(tl.float32), odd_PD.to(tl.float32)
                even_RD, odd_RD = _levels(w_RD, table, even_PD.dtype, FORM, PTX)
                if FORM == "int4":
                    all_P = _sums(sums_P, begin // GROUP + part, depth // GROUP, WHOLE_TILES)
                part_RP = tl.dot(even_RD.to(even_PD.dtype), tl.trans(even_PD), input_precision="ieee")
                part_RP = tl.dot(odd_RD.to(even_PD.dtype), tl.trans(odd_PD), part_RP, input_precision="ieee")
                if FORM == "int4":
                    part_RP -= scales[part][1].to(tl.float32)[:, None] * 0.0625 * all_P[None, :]
                sums_RP += part_RP * scales[part][0].to(tl.float32)[:, None]
    if FORM == "int8":
        sums_RP *= tl.load(scale_R)[:, None]
    _store(sums_RP, y_PR, pair_P, row_R, chosen_P, own_P, pairs, experts, rows, WAY)


@triton.jit
def _program(
    index: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    WAY: tl.constexpr,
    ALL_EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Expert and pairs of this program, the experts of these (for WAY "gathered"), and which of them are its to do."""
    tile = tl.program_id(0)
    place_P = tl.arange(0, PAIRS)
    if WAY == "dense":
        pair_P = tile * PAIRS + place_P
        return tl.full((), 0, tl.int64), pair_P, pair_P.to(tl.int64), pair_P < pairs
    elif WAY == "gathered":
        expert = tile.to(tl.int64)
        chosen_P = tl.load(index + place_P, place_P < pairs, -1)
        return expert, place_P, chosen_P, chosen_P == expert
    else:
        expert, first, last = _sorted_tile(index, tile, experts, ALL_EXPERTS, PAIRS)
        pair_P = first + place_P
        return expert, pair_P, pair_P.to(tl.int64), pair_P < last


@triton.jit
def _scales(
    begin: tl.tensor,
    depth: tl.tensor,
    scale_R: tl.tensor,
    scale_group: tl.tensor,
    zero_R: tl.tensor,
    zero_group: tl.tensor,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tuple[tuple[tl.tensor, tl.tensor], ...]:
    """Scales and zero points (of "int4") of the groups of a tile; of the last group behind the end.

    They are read a tile ahead: the compiler does so for what a dot reads, and for these would wait in every group.
    """
    found = ()
    for part in tl.static_range(DEPTH // GROUP):
        group = tl.minimum(begin // GROUP + part, depth // GROUP - 1)
        scale = tl.load(scale_R + group * scale_group)
        zero = scale
        if FORM == "int4":
            zero = tl.load(zero_R + group * zero_group)
        found += ((scale, zero),)  # type: ignore[assignment]
    return found


@triton.jit
def _sums(sums_P: tl.tensor, group: tl.tensor, groups: tl.tensor, WHOLE_TILES: tl.constexpr) -> tl.tensor:
    """The sums of a group's inputs; zeros behind the end."""
    if WHOLE_TILES:
        return tl.load(sums_P + group)
    else:
        return tl.where(group < groups, tl.load(sums_P + tl.minimum(group, groups - 1)), 0)


@triton.jit
def _share(some: tl.tensor, depth: tl.tensor, DEPTH: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Where this program's part of the depth begins and ends: programs of axis 2 share it by whole tiles."""
    share = tl.cdiv(tl.cdiv(depth, DEPTH), tl.num_programs(2)) * DEPTH
    first = tl.program_id(2) * share
    return first, tl.where(some, tl.minimum(first + share, depth), first)


@triton.jit
def _store(
    sums_RP: tl.tensor,
    y_PR: tl.tensor,
    pair_P: tl.tensor,
    row_R: tl.tensor,
    chosen_P: tl.tensor,
    own_P: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    rows: tl.tensor,
    WAY: tl.constexpr,
) -> None:
    """The sums of this program; the first expert's programs also store what pairs of no expert get."""
    if WAY == "gathered":
        sums_RP = tl.where(own_P[None, :], sums_RP, tl.where(chosen_P < 0, 0, float("nan"))[None, :])
        nobody_P = (chosen_P < 0) | (chosen_P >= experts)
        own_P = (own_P | (nobody_P & (tl.program_id(0) == 0))) & (pair_P < pairs)
    at_P = tl.program_id(2).to(tl.int64) * pairs + pair_P
    at_RP = at_P[None, :] * rows + row_R[:, None]
    tl.store(y_PR + at_RP, sums_RP.to(y_PR.dtype.element_ty), own_P[None, :] & (row_R < rows)[:, None])


@triton.jit
def _load(at: tl.tensor, some: tl.tensor, WHOLE_TILES: tl.constexpr) -> tl.tensor:
    """What lies there; zeros behind the end of the rows."""
    if WHOLE_TILES:
        return tl.load(at)
    else:
        return tl.load(at, some, 0)


@triton.jit
def _sorted_tile(
    offsets_E: tl.tensor, tile: tl.tensor, experts: tl.tensor, ALL_EXPERTS: tl.constexpr, PAIRS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Expert of the tile of that number, its first pair, and the end of that expert's pairs; no pairs: no such tile.

    Tiles are counted over the experts, each of which has as many as its pairs fill.
    """
    number_E = tl.arange(0, ALL_EXPERTS)
    end_E = tl.load(offsets_E + number_E, number_E < experts, 0)
    begin_E = tl.load(offsets_E + number_E - 1, (number_E > 0) & (number_E < experts), 0)
    tiles_E = (end_E - begin_E + PAIRS - 1) // PAIRS
    behind_E = tl.cumsum(tiles_E, axis=0)
    mine_E = (behind_E > tile) & (behind_E - tiles_E <= tile)
    expert = tl.sum(tl.where(mine_E, number_E, 0), axis=0)
    first = tl.sum(tl.where(mine_E, begin_E + (tile - behind_E + tiles_E) * PAIRS, 0), axis=0)
    last = tl.sum(tl.where(mine_E, end_E, 0), axis=0)
    return expert.to(tl.int64), first, last


@triton.jit
def _levels(
    codes_RD: tl.tensor, table: tl.tensor, dtype: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """What the upper and the lower codes stand for."""
    if PTX != "" and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r", [codes_RD], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif PTX != "":
        return tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r", [codes_RD], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif FORM == "int4":
        return codes_RD >> 4, codes_RD & 15
    else:
        return tl.load(table + (codes_RD >> 4)), tl.load(table + (codes_RD & 15))
