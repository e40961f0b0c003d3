"""Products of few tokens with weights on a GPU, one program for a block of an output's rows.

The twins of native.cpp and quantized.cpp: the expert's number is read here, on the GPU, and sums are in float32.
Activations stay float. `triton_products` launches them; the formats are described in quantized.py.

Shape letters: R rows (outputs), D depth (inputs), J pairs of inputs whose two codes share a byte.
"""

import triton
import triton.language as tl


@triton.jit
def plain_product(
    x, w, expert, y, rows, depth, w_expert, w_row, GATHERED: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """y[p, r] = w[expert[p], r] . x[p]; a negative expert gives zeros."""
    p = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    e = tl.load(expert + p) if GATHERED else p * 0
    sums = tl.zeros((R,), dtype=tl.float32)
    if e >= 0:
        own = w + e * w_expert + r[:, None] * w_row
        for start in range(0, depth, D):
            d = start + tl.arange(0, D)
            x_D = tl.load(x + p * depth + d, mask=d < depth, other=0.0).to(tl.float32)
            here = (r[:, None] < rows) & (d[None, :] < depth)
            w_RD = tl.load(own + d[None, :], mask=here, other=0.0).to(tl.float32)
            sums += tl.sum(w_RD * x_D[None, :], axis=1)
    tl.store(y + p * rows + r, sums.to(y.dtype.element_ty), mask=r < rows)


@triton.jit
def int8_product(
    x, codes, scale, expert, y, rows, depth, codes_expert, codes_row, scale_expert, scale_row,
    GATHERED: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The same for codes with one scale for each row."""
    p = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    e = tl.load(expert + p) if GATHERED else p * 0
    sums = tl.zeros((R,), dtype=tl.float32)
    if e >= 0:
        own = codes + e * codes_expert + r[:, None] * codes_row
        for start in range(0, depth, D):
            d = start + tl.arange(0, D)
            x_D = tl.load(x + p * depth + d, mask=d < depth, other=0.0).to(tl.float32)
            here = (r[:, None] < rows) & (d[None, :] < depth)
            w_RD = tl.load(own + d[None, :], mask=here, other=0).to(tl.float32)
            sums += tl.sum(w_RD * x_D[None, :], axis=1)
        sums *= tl.load(scale + e * scale_expert + r * scale_row, mask=r < rows, other=0.0)
    tl.store(y + p * rows + r, sums.to(y.dtype.element_ty), mask=r < rows)


@triton.jit
def packed_product(
    x, codes, scale, zero, table, expert, y, rows, depth, codes_expert, codes_row, scale_expert, scale_row,
    GATHERED: tl.constexpr, NF4: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """The same for 4-bit codes, the even input's in the upper half of a byte; ``zero`` has the strides of ``scale``.

    With NF4 a code stands for an entry of ``table``, else for itself less a sixteenth of the zero point.
    """
    p = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    e = tl.load(expert + p) if GATHERED else p * 0
    sums = tl.zeros((R,), dtype=tl.float32)
    if e >= 0:
        own = codes + e * codes_expert + r[:, None] * codes_row
        own_groups = e * scale_expert + r[:, None] * scale_row
        for start in range(0, depth // 2, J):
            j = start + tl.arange(0, J)
            even = tl.load(x + p * depth + 2 * j, mask=2 * j < depth, other=0.0).to(tl.float32)
            odd = tl.load(x + p * depth + 2 * j + 1, mask=2 * j < depth, other=0.0).to(tl.float32)
            here = (r[:, None] < rows) & (2 * j[None, :] < depth)
            pairs_RJ = tl.load(own + j[None, :], mask=here, other=0).to(tl.int32)
            groups = own_groups + (2 * j // GROUP)[None, :]
            scale_RJ = tl.load(scale + groups, mask=here, other=0.0).to(tl.float32)
            if NF4:
                upper, lower = tl.load(table + (pairs_RJ >> 4)), tl.load(table + (pairs_RJ & 15))
            else:
                zero_RJ = tl.load(zero + groups, mask=here, other=0).to(tl.float32) * 0.0625
                upper, lower = (pairs_RJ >> 4).to(tl.float32) - zero_RJ, (pairs_RJ & 15).to(tl.float32) - zero_RJ
            sums += tl.sum((upper * even[None, :] + lower * odd[None, :]) * scale_RJ, axis=1)
    tl.store(y + p * rows + r, sums.to(y.dtype.element_ty), mask=r < rows)
