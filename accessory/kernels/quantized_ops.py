"""The operations with quantized weights, for any number of tokens, each choosing its way; see quantized.py.

For inference: the operations have no derivative; `accessory.quant` puts one around them.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import torch
from torch import Tensor

from . import triton_products
from .linear import called_directly
from .native import DTYPES
from .quantized import GROUPS, NF4_GROUP, depth_of, form_of, plain_values, quantized_linear_reference
from .quantized_native import NativeWeight, native_values, native_weight, quantized_product
from .tensors import shown
from .tiles import tiled_quantized_product, tiles_serve

# Tokens up to which the kernel is taken and not plain values, in bfloat16. us, kernel / plain, as in linear.py:
#               int8, 8 tokens   16           32            nf4, 8       16           32
#   7168, 1024  424 / 2158       812 / 2426   1516 / 2981   634 / 2162   1225 / 2443  2462 / 3106
#   1024, 3584  236 / 544        421 / 687    779 / 954     331 / 587    640 / 719    1293 / 1015
# int4 takes as long as int8, and its plain way 5 to 15 % longer. Beyond 16, nf4 is what loses.
_FEW = 16
_FEW_FLOAT32 = 32  # by linear.py's times of plain float32 products
_SCRATCH = 2**22  # elements of plain weights at a time: they stay in the cache until they are multiplied


def quantized_linear(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, native: NativeWeight | None = None
) -> Tensor:
    """x @ w.T for a weight (R, D), (P, R) in x's dtype, by the fastest way for this number of tokens.

    Args:
        native: the same weight as `described` gives it, where the caller keeps it (checks and descriptions cost as much
            as a small product) and x is `called_directly`.
    """
    if native is not None and x_PD.dtype in DTYPES and _few(x_PD):
        _check_product(x_PD, native, stacked=False)
        return quantized_product(x_PD, native, None)
    if called_directly(x_PD):
        return _multiply(x_PD, codes, scale, zero)
    return torch.ops.accessory.quantized_linear(x_PD, codes, scale, zero)


def gathered_quantized_linear(
    x_PD: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    expert_P: Tensor,
    *,
    native: NativeWeight | None = None,
) -> Tensor:
    """y[p] = w[expert[p]] @ x[p] for a weight (E, ..., D) and few pairs; a negative expert gives zeros.

    The axes between are rows. With the native kernel every needed row of w is read once, and a pair's result does not
    depend on the other pairs, to the bit. On GPU a Triton kernel serves where it can, or plain values do, a block of
    rows after another. Without the native library this is `quantized_linear_reference`.

    Args:
        native: as in `quantized_linear`.
    """
    if native is not None and x_PD.dtype in DTYPES:
        _check_product(x_PD, native, stacked=True)
        _check_index(expert_P, torch.int64, x_PD.shape[0], "pair")
        return quantized_product(x_PD, native, expert_P)
    if codes.dim() > 3:
        codes, scale, zero = codes.flatten(1, -2), scale.flatten(1, -2), None if zero is None else zero.flatten(1, -2)
    if called_directly(x_PD):
        return _multiply_gathered(x_PD, codes, scale, zero, expert_P)
    return torch.ops.accessory.gathered_quantized_linear(x_PD, codes, scale, zero, expert_P)


def grouped_quantized_linear(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offsets_E: Tensor
) -> Tensor:
    """Rows [offsets[e-1], offsets[e]) of x times expert e's matrix transposed, for many; (P, R) in x's dtype.

    Rows behind the last offset come back as zeros.
    """
    return torch.ops.accessory.grouped_quantized_linear(x_PD, codes, scale, zero, offsets_E)


def quantized_experts_synchronise() -> bool:
    """Whether on a GPU the products of pairs with quantized weights wait for a number from the device."""
    return not triton_products.triton_available()


def described(codes: Tensor, scale: Tensor, zero: Tensor | None) -> NativeWeight | None:
    """For `native` of the products above: None where the native library does not read such a weight.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    _check_weight(codes, scale, zero)
    return native_weight(codes, scale, zero)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The plain weight (..., R, D)."""
    return torch.ops.accessory.dequantize(codes, scale, zero, dtype)


@torch.library.custom_op("accessory::dequantize", mutates_args=())
def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_weight(codes, scale, zero)
    native = _native(dtype, codes, scale, zero)
    if native is None:
        return plain_values(codes, scale, zero, dtype)
    return native_values(native, torch.empty(*codes.shape[:-1], depth_of(codes), dtype=dtype))


@_dequantize.register_kernel("cuda")
def _dequantize_on_cuda(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_weight(codes, scale, zero)
    if dtype in triton_products.DTYPES and triton_products.triton_available():
        return triton_products.plain_values(codes, scale, zero, dtype)
    return plain_values(codes, scale, zero, dtype)


@_dequantize.register_fake
def _dequantize_fake(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_weight(codes, scale, zero)
    return codes.new_empty(*codes.shape[:-1], depth_of(codes), dtype=dtype)


def _multiply(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=2)
    if not _few(x_PD):
        native = _tiled(x_PD, codes, scale, zero)
        return _by_blocks(x_PD, codes, scale, zero) if native is None else tiled_quantized_product(x_PD, native, None)
    native = _native(x_PD.dtype, codes, scale, zero)
    if native is None:
        return quantized_linear_reference(x_PD, codes, scale, zero)
    return quantized_product(x_PD, native, None)


_quantized_linear = torch.library.custom_op("accessory::quantized_linear", _multiply, mutates_args=())


@_quantized_linear.register_kernel("cuda")
def _multiply_on_cuda(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=2)
    if not triton_products.triton_serves(x_PD, codes, scale, zero):
        return _by_blocks(x_PD, codes, scale, zero)
    return triton_products.quantized_linear(x_PD, codes, scale, zero)


@_quantized_linear.register_fake
def _quantized_linear_fake(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=2)
    return x_PD.new_empty(x_PD.shape[0], codes.shape[0])


def _multiply_gathered(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(expert_P, torch.int64, x_PD.shape[0], "pair")
    native = _native(x_PD.dtype, codes, scale, zero)
    if native is None:
        return quantized_linear_reference(x_PD, codes, scale, zero, expert_P)
    return quantized_product(x_PD, native, expert_P)


_gathered_quantized_linear = torch.library.custom_op(
    "accessory::gathered_quantized_linear", _multiply_gathered, mutates_args=()
)


@_gathered_quantized_linear.register_kernel("cuda")
def _multiply_gathered_on_cuda(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor
) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(expert_P, torch.int64, x_PD.shape[0], "pair")
    if not triton_products.triton_serves(x_PD, codes, scale, zero):
        return _gathered_by_blocks(x_PD, codes, scale, zero, expert_P)
    return triton_products.gathered_quantized_linear(x_PD, codes, scale, zero, expert_P)


@_gathered_quantized_linear.register_fake
def _gathered_quantized_linear_fake(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor
) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(expert_P, torch.int64, x_PD.shape[0], "pair")
    return x_PD.new_empty(x_PD.shape[0], codes.shape[1])


def _multiply_grouped(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offsets_E: Tensor) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(offsets_E, torch.int32, codes.shape[0], "expert")
    native = _tiled(x_PD, codes, scale, zero)
    if native is not None:
        y_PR = tiled_quantized_product(x_PD, native, offsets_E)
        y_PR[int(offsets_E[-1]) :] = 0
        return y_PR
    y_PR = x_PD.new_empty(x_PD.shape[0], codes.shape[1])
    begin = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > begin:
            own = (codes[expert], scale[expert], None if zero is None else zero[expert])
            _by_blocks(x_PD[begin:end], *own, out=y_PR[begin:end])
        begin = end
    y_PR[begin:] = 0
    return y_PR


_grouped_quantized_linear = torch.library.custom_op(
    "accessory::grouped_quantized_linear", _multiply_grouped, mutates_args=()
)


@_grouped_quantized_linear.register_kernel("cuda")
def _multiply_grouped_on_cuda(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offsets_E: Tensor
) -> Tensor:
    if not triton_products.triton_serves(x_PD, codes, scale, zero):
        return _multiply_grouped(x_PD, codes, scale, zero, offsets_E)
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(offsets_E, torch.int32, codes.shape[0], "expert")
    return triton_products.grouped_quantized_linear(x_PD, codes, scale, zero, offsets_E)


@_grouped_quantized_linear.register_fake
def _grouped_quantized_linear_fake(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offsets_E: Tensor
) -> Tensor:
    _check(x_PD, codes, scale, zero, axes=3)
    _check_index(offsets_E, torch.int32, codes.shape[0], "expert")
    return x_PD.new_empty(x_PD.shape[0], codes.shape[1])


def _tiled(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> NativeWeight | None:
    """The weight for `tiled_product`, where that multiplies such activations with it."""
    serves = x_PD.is_cpu and x_PD.dtype == torch.bfloat16 and tiles_serve()
    return native_weight(codes, scale, zero) if serves else None


def _few(x_PD: Tensor) -> bool:
    return x_PD.shape[0] <= (_FEW_FLOAT32 if x_PD.dtype == torch.float32 else _FEW)


def _by_blocks(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """x @ w.T for a weight (R, D) through plain values in x's dtype, a block of rows after another."""
    rows, depth = codes.shape[0], depth_of(codes)
    y_PR = x_PD.new_empty(x_PD.shape[0], rows) if out is None else out
    block = min(rows, max(1, _SCRATCH // max(1, depth)))
    scratch: Tensor | None = None
    for begin in range(0, rows, max(1, block)):
        part = slice(begin, begin + block)
        own = (codes[part], scale[part], None if zero is None else zero[part])
        native = _native(x_PD.dtype, *own)
        if native is None:
            w_BD = plain_values(*own, x_PD.dtype)
        else:
            scratch = x_PD.new_empty(block, depth) if scratch is None else scratch
            w_BD = native_values(native, scratch[: own[0].shape[0]])
        torch.mm(x_PD, w_BD.T, out=y_PR[:, part])
    return y_PR


def _gathered_by_blocks(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor) -> Tensor:
    """The gathered product without a kernel for it: in the memory of one matrix, and without waiting for the device."""
    y_PR = x_PD.new_empty(x_PD.shape[0], codes.shape[1])
    chosen_P = expert_P.clamp(min=0)
    for pair in range(x_PD.shape[0]):
        place = slice(pair, pair + 1)
        own_codes, own_scale = (tensor.index_select(0, chosen_P[place])[0] for tensor in (codes, scale))
        own_zero = None if zero is None else zero.index_select(0, chosen_P[place])[0]
        _by_blocks(x_PD[place], own_codes, own_scale, own_zero, out=y_PR[place])
    return y_PR.masked_fill_(expert_P[:, None] < 0, 0)


def _native(dtype: torch.dtype, codes: Tensor, scale: Tensor, zero: Tensor | None) -> NativeWeight | None:
    """The weight for the native library, where that multiplies activations of this dtype with it."""
    return native_weight(codes, scale, zero) if dtype in DTYPES else None


def _check(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, axes: int) -> None:
    _check_weight(codes, scale, zero)
    if codes.dim() != axes:
        raise ValueError(f"codes {shown(codes)} are not those of a weight with {axes} axes")
    _check_inputs(x_PD, depth_of(codes))


def _check_product(x_PD: Tensor, native: NativeWeight, *, stacked: bool) -> None:
    if native.stacked != stacked:
        raise ValueError(f"a weight {'of' if native.stacked else 'without'} stacked experts does not fit this product")
    _check_inputs(x_PD, native.depth)


def _check_inputs(x_PD: Tensor, depth: int) -> None:
    if x_PD.dim() != 2 or x_PD.shape[1] != depth or not x_PD.is_floating_point():
        raise ValueError(f"x_PD {shown(x_PD)} does not fit a weight with {depth} inputs")


def _check_weight(codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    form, depth, groups = form_of(codes, zero), depth_of(codes), scale.shape[-1]
    if form == "int8":
        fits = groups == 1 and (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    else:
        sizes, dtype = (GROUPS, torch.bfloat16) if form == "int4" else ((NF4_GROUP,), torch.float32)
        fits = depth in [groups * size for size in sizes] and (codes.dtype, scale.dtype) == (torch.uint8, dtype)
    if not fits or scale.shape[:-1] != codes.shape[:-1]:
        raise ValueError(f"scale {shown(scale)} does not fit codes {shown(codes)} of a weight in {form}")
    if zero is not None and (zero.shape != scale.shape or zero.dtype != torch.uint8):
        raise ValueError(f"zero {shown(zero)} does not fit scale {shown(scale)} of a weight in {form}")


def _check_index(index: Tensor, dtype: torch.dtype, count: int, what: str) -> None:
    if index.shape != (count,) or index.dtype != dtype:
        raise ValueError(f"{shown(index)} must hold one {str(dtype).removeprefix('torch.')} for each {what}")
