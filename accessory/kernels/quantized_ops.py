"""The operations with quantized weights, for any number of tokens, each choosing its way; see quantized.py.

For inference: the operations have no derivative; `accessory.quant` puts one around them.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import torch
from torch import Tensor

from . import triton_products
from .linear import called_directly
from .quantized import GROUPS, NF4_GROUP, depth_of, form_of, plain_values, quantized_linear_reference
from .quantized_native import native_serves, native_values, quantized_product

# Tokens up to which the kernel is taken and not plain values, in bfloat16. us, kernel / plain, as in linear.py:
#               int8, 8 tokens      16         32          int4, 8      16         32         nf4, 8      16
#   7168, 1024  289 / 709     517 / 846  965 / 1096   265 / 1185  496 / 1363  958 / 1710  414 / 735  801 / 864
#   1024, 3584  150 / 289     252 / 331      -        135 / 327   251 / 380   473 / 506   399 / 290  792 / 350
_FEW = {"int8": 16, "int4": 16, "nf4": 8}
_FEW_NF4_ELEMENTS = 16384  # of x: beyond them its staged floats leave the first cache
_FEW_FLOAT32 = 32  # by linear.py's times of plain float32 products
_SCRATCH = 2**22  # elements of plain weights at a time: they stay in the cache until they are multiplied


def quantized_linear(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """x @ w.T for a weight (R, D), (P, R) in x's dtype, by the fastest way for this number of tokens."""
    if called_directly(x_PD):
        return _multiply(x_PD, codes, scale, zero)
    return torch.ops.accessory.quantized_linear(x_PD, codes, scale, zero)


def gathered_quantized_linear(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor
) -> Tensor:
    """y[p] = w[expert[p]] @ x[p] for a weight (E, R, D) and few pairs; a negative expert gives zeros.

    With the native kernel every needed row of w is read once, and a pair's result does not depend on the other
    pairs, to the bit. On GPU a Triton kernel serves where it can. Otherwise this is `quantized_linear_reference`.
    """
    if called_directly(x_PD):
        return _multiply_gathered(x_PD, codes, scale, zero, expert_P)
    return torch.ops.accessory.gathered_quantized_linear(x_PD, codes, scale, zero, expert_P)


def grouped_quantized_linear(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, ends_E: Tensor) -> Tensor:
    """Rows [ends[e-1], ends[e]) of x times expert e's matrix transposed, for many; (P, R) in x's dtype.

    Rows behind the last end come back as zeros.
    """
    return torch.ops.accessory.grouped_quantized_linear(x_PD, codes, scale, zero, ends_E)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The plain weight (..., R, D)."""
    return torch.ops.accessory.dequantize(codes, scale, zero, dtype)


@torch.library.custom_op("accessory::dequantize", mutates_args=())
def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_weight(codes, scale, zero)
    if codes.dim() not in (2, 3) or not native_serves(dtype, codes, scale, zero):
        return plain_values(codes, scale, zero, dtype)
    out = torch.empty(*codes.shape[:-1], depth_of(codes), dtype=dtype)
    if codes.dim() == 3:
        return native_values(codes, scale, zero, out)
    return native_values(codes[None], scale[None], None if zero is None else zero[None], out)


@_dequantize.register_fake
def _dequantize_fake(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_weight(codes, scale, zero)
    return codes.new_empty(*codes.shape[:-1], depth_of(codes), dtype=dtype)


def _multiply(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=2)
    if not _few(x_PD, codes, zero):
        return _by_blocks(x_PD, codes, scale, zero)
    if native_serves(x_PD.dtype, codes, scale, zero):
        return quantized_product(x_PD, codes[None], scale[None], None if zero is None else zero[None], None)
    return quantized_linear_reference(x_PD, codes, scale, zero)


_quantized_linear = torch.library.custom_op("accessory::quantized_linear", _multiply, mutates_args=())


@_quantized_linear.register_kernel("cuda")
def _multiply_on_cuda(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    if not (_few(x_PD, codes, zero) and triton_products.triton_serves(x_PD, codes, scale, zero)):
        return _multiply(x_PD, codes, scale, zero)
    _check(x_PD, codes, scale, zero, axes=2)
    return triton_products.quantized_linear(x_PD, codes, scale, zero)


@_quantized_linear.register_fake
def _quantized_linear_fake(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=2)
    return x_PD.new_empty(x_PD.shape[0], codes.shape[0])


def _multiply_gathered(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(expert_P, torch.int64, x_PD.shape[0], "pair")
    if native_serves(x_PD.dtype, codes, scale, zero):
        return quantized_product(x_PD, codes, scale, zero, expert_P)
    return quantized_linear_reference(x_PD, codes, scale, zero, expert_P)


_gathered_quantized_linear = torch.library.custom_op(
    "accessory::gathered_quantized_linear", _multiply_gathered, mutates_args=()
)


@_gathered_quantized_linear.register_kernel("cuda")
def _multiply_gathered_on_cuda(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor
) -> Tensor:
    if not triton_products.triton_serves(x_PD, codes, scale, zero):
        return _multiply_gathered(x_PD, codes, scale, zero, expert_P)
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(expert_P, torch.int64, x_PD.shape[0], "pair")
    return triton_products.gathered_quantized_linear(x_PD, codes, scale, zero, expert_P)


@_gathered_quantized_linear.register_fake
def _gathered_quantized_linear_fake(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor
) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(expert_P, torch.int64, x_PD.shape[0], "pair")
    return x_PD.new_empty(x_PD.shape[0], codes.shape[1])


@torch.library.custom_op("accessory::grouped_quantized_linear", mutates_args=())
def _grouped_quantized_linear(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, ends_E: Tensor
) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(ends_E, torch.int32, codes.shape[0], "expert")
    y_PR = x_PD.new_empty(x_PD.shape[0], codes.shape[1])
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > begin:
            own = (codes[expert], scale[expert], None if zero is None else zero[expert])
            _by_blocks(x_PD[begin:end], *own, out=y_PR[begin:end])
        begin = end
    y_PR[begin:] = 0
    return y_PR


@_grouped_quantized_linear.register_fake
def _grouped_quantized_linear_fake(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, ends_E: Tensor
) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(ends_E, torch.int32, codes.shape[0], "expert")
    return x_PD.new_empty(x_PD.shape[0], codes.shape[1])


def _few(x_PD: Tensor, codes: Tensor, zero: Tensor | None) -> bool:
    if x_PD.dtype == torch.float32:
        return x_PD.shape[0] <= _FEW_FLOAT32
    form = form_of(codes, zero)
    return x_PD.shape[0] <= _FEW[form] and (form != "nf4" or x_PD.numel() <= _FEW_NF4_ELEMENTS)


def _by_blocks(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """x @ w.T for a weight (R, D) through plain values in x's dtype, a block of rows after another."""
    rows, depth = codes.shape[0], depth_of(codes)
    y_PR = x_PD.new_empty(x_PD.shape[0], rows) if out is None else out
    block = min(rows, max(1, _SCRATCH // max(1, depth)))
    native = native_serves(x_PD.dtype, codes, scale, zero)
    scratch = x_PD.new_empty(block, depth) if native else None
    for begin in range(0, rows, max(1, block)):
        part = slice(begin, begin + block)
        own = (codes[part], scale[part], None if zero is None else zero[part])
        if scratch is None:
            w_BD = plain_values(*own, x_PD.dtype)
        else:
            w_BD = scratch[: own[0].shape[0]]
            native_values(own[0][None], own[1][None], None if own[2] is None else own[2][None], w_BD)
        torch.mm(x_PD, w_BD.T, out=y_PR[:, part])
    return y_PR


def _check(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, axes: int) -> None:
    _check_weight(codes, scale, zero)
    if x_PD.dim() != 2 or codes.dim() != axes or x_PD.shape[1] != depth_of(codes) or not x_PD.is_floating_point():
        raise ValueError(f"x_PD {_form(x_PD)} does not fit a weight with codes {_form(codes)}")


def _check_weight(codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    form, depth, groups = form_of(codes, zero), depth_of(codes), scale.shape[-1]
    if form == "int8":
        fits = groups == 1 and (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    else:
        sizes, dtype = (GROUPS, torch.bfloat16) if form == "int4" else ((NF4_GROUP,), torch.float32)
        fits = depth in [groups * size for size in sizes] and (codes.dtype, scale.dtype) == (torch.uint8, dtype)
    if not fits or scale.shape[:-1] != codes.shape[:-1]:
        raise ValueError(f"scale {_form(scale)} does not fit codes {_form(codes)} of a weight in {form}")
    if zero is not None and (zero.shape != scale.shape or zero.dtype != torch.uint8):
        raise ValueError(f"zero {_form(zero)} does not fit scale {_form(scale)} of a weight in {form}")


def _check_index(index: Tensor, dtype: torch.dtype, count: int, what: str) -> None:
    if index.shape != (count,) or index.dtype != dtype:
        raise ValueError(f"{_form(index)} must hold one {str(dtype).removeprefix('torch.')} for each {what}")


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
