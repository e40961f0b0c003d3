"""The operations with quantized weights, for any number of tokens, each choosing its way; see activations.py.

Each function takes what serves on a GPU, then on a CPU, then the reference. It is an operation of PyTorch too, so that
torch.compile keeps it as one, and only there a weight becomes its tensors. For inference: no derivative;
`accessory.products` puts one around them.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import functools
import math
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.quant import FORMATS, Format, QuantizedWeight

from .activations import round_activations, rounds_activations
from .cpu import quantized as on_cpu
from .cpu.library import DTYPES, tiles_serve
from .cpu.quantized import NativeWeight, native_weight
from .products import experts_of, pairs_by_expert
from .tensors import called_directly, shown
from .triton import products as on_gpu

# Tokens up to which the kernel is taken and not plain values, in bfloat16 and in float32: by docs/benchmarks.md, "The
# kernels for few tokens".
_FEW = 16
_FEW_FLOAT32 = 32
# Tokens of a matrix from which on AMX's tiles multiply it, of codes in 8 bits and in 4, which they have to unpack.
_TILED_8_BITS, _TILED_4_BITS = 2, 5
_SCRATCH = 2**22  # elements of plain weights at a time: they stay in the cache until they are multiplied


P = ParamSpec("P")


def register(name: str, index: torch.dtype | None) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Make a product the operation accessory::name, with its checks and what torch.compile must know of its result.

    Args:
        index: of the products with stacked experts (E, ..., R, D), the dtype of what says which rows are whose.
    """

    def registered(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def operation(
            x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, form: str, which: Tensor | None
        ) -> Tensor:
            weight = QuantizedWeight(FORMATS[form], codes, scale, zero)
            _check(x_PD, weight, which, index)
            return product(x_PD, weight, *(() if which is None else (which,)))

        def fake(
            x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, form: str, which: Tensor | None
        ) -> Tensor:
            _check(x_PD, QuantizedWeight(FORMATS[form], codes, scale, zero), which, index)
            return x_PD.new_empty(x_PD.shape[0], codes.shape[-2])

        torch.library.custom_op(f"accessory::{name}", operation, mutates_args=()).register_fake(fake)
        compiled = getattr(torch.ops.accessory, name)

        @functools.wraps(product)
        def call(x_PD: Tensor, weight: QuantizedWeight, which: Tensor | None = None) -> Tensor:
            if called_directly(x_PD):
                _check(x_PD, weight, which, index)
                return product(x_PD, weight, *(() if which is None else (which,)))
            if index is not None:
                weight = weight.flatten(1, -2)
            return compiled(x_PD, *unpacked(weight), which)

        return call

    return registered


def unpacked(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """As the operations of PyTorch take it."""
    return weight.codes, weight.scale, weight.zero, weight.format.key


def _check(x_PD: Tensor, weight: QuantizedWeight, which: Tensor | None, index: torch.dtype | None) -> None:
    depth, stacked = weight.depth, weight.codes.dim() > 2
    if stacked != (index is not None):
        raise ValueError(f"a weight {'of' if stacked else 'without'} stacked experts does not fit this product")
    if x_PD.dim() != 2 or x_PD.shape[1] != depth or not x_PD.is_floating_point():
        raise ValueError(f"x_PD {shown(x_PD)} does not fit a weight with {depth} inputs")
    if which is not None:
        each, count = ("pair", x_PD.shape[0]) if index == torch.int64 else ("expert", weight.codes.shape[0])
        if which.shape != (count,) or which.dtype != index:
            raise ValueError(f"{shown(which)} must hold one {str(index).removeprefix('torch.')} for each {each}")


@register("quantized_linear", index=None)
def quantized_linear(x_PD: Tensor, weight: QuantizedWeight) -> Tensor:
    """x @ w.T for a weight (R, D), (P, R) in x's dtype, by the fastest way for this number of tokens.

    Raises:
        ValueError: what does not fit, here and below.
    """
    if _on_gpu(x_PD, weight):
        return on_gpu.quantized_linear(x_PD, weight)
    native = _tiled(x_PD, weight, x_PD.shape[0])
    if native is not None:
        return on_cpu.gathered_quantized_linear(x_PD, native, None, variant="tiles")
    if _without_kernel(x_PD, weight) or x_PD.shape[0] > (_FEW_FLOAT32 if x_PD.dtype == torch.float32 else _FEW):
        return _by_blocks(x_PD, weight)
    native = _native(x_PD.dtype, weight)
    if native is not None:
        return on_cpu.gathered_quantized_linear(x_PD, native, None)
    return quantized_linear_reference(x_PD, weight)


@register("gathered_quantized_linear", index=torch.int64)
def gathered_quantized_linear(x_PD: Tensor, weight: QuantizedWeight, expert_P: Tensor) -> Tensor:
    """y[p] = w[expert[p]] @ x[p] for a weight (E, ..., D); a negative expert gives zeros.

    The axes between are rows. With the native kernel every needed row of w is read once, and a pair's result does not
    depend on the other pairs, to the bit; AMX's tiles serve many, and round a weight in 4 bits once more. Where no
    kernel reads the format, or a GPU has no Triton, plain values serve, a block of rows after another.
    """
    if _on_gpu(x_PD, weight):
        return on_gpu.gathered_quantized_linear(x_PD, weight, expert_P)
    if _without_kernel(x_PD, weight):
        return _gathered_by_blocks(x_PD, weight.flatten(1, -2), expert_P)
    native = _tiled(x_PD, weight, x_PD.shape[0] / max(1, weight.codes.shape[0]))
    if native is not None:
        return on_cpu.gathered_quantized_linear(x_PD, native, expert_P, variant="tiles")
    native = _native(x_PD.dtype, weight)
    if native is not None:
        return on_cpu.gathered_quantized_linear(x_PD, native, expert_P)
    return quantized_linear_reference(x_PD, weight, expert_P)


@register("grouped_quantized_linear", index=torch.int32)
def grouped_quantized_linear(x_PD: Tensor, weight: QuantizedWeight, offsets_E: Tensor) -> Tensor:
    """Rows [offsets[e-1], offsets[e]) of x times expert e's matrix transposed, for many; (P, R) in x's dtype.

    Rows behind the last offset come back as zeros.
    """
    if _on_gpu(x_PD, weight):
        return on_gpu.grouped_quantized_linear(x_PD, weight, offsets_E)
    weight = weight.flatten(1, -2)
    native = _tiled(x_PD, weight, math.inf)
    if native is not None:
        return on_cpu.gathered_quantized_linear(x_PD, native, experts_of(offsets_E, x_PD.shape[0]), variant="tiles")
    y_PR, begin = x_PD.new_empty(x_PD.shape[0], weight.shape[1]), 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > begin:
            _by_blocks(x_PD[begin:end], weight[expert], out=y_PR[begin:end])
        begin = end
    y_PR[begin:] = 0
    return y_PR


def quantized_linear_reference(x_PD: Tensor, weight: QuantizedWeight, expert_P: Tensor | None = None) -> Tensor:
    """What the native product with few tokens computes; without expert_P the weight is (R, D), not (E, ..., D)."""
    rounds = weight.format.kind is not None and rounds_activations(x_PD.dtype)
    x = round_activations(x_PD) if rounds else x_PD
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if expert_P is None:
        return F.linear(x, weight.dequantize(x.dtype, in_steps=rounds)).to(x_PD.dtype)
    weight = weight.flatten(1, -2)
    if weight.shape[0] == 0:  # a rank without experts
        return x_PD.new_zeros(x_PD.shape[0], weight.shape[1])
    w_PRD = weight.gathered(expert_P.clamp(min=0)).dequantize(x.dtype, in_steps=rounds)
    y_PR = torch.bmm(w_PRD, x.unsqueeze(-1)).squeeze(-1)
    return y_PR.masked_fill((expert_P < 0).unsqueeze(-1), 0).to(x_PD.dtype)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The plain weight (..., R, D)."""
    return torch.ops.accessory.dequantize(*unpacked(weight), dtype)


@torch.library.custom_op("accessory::dequantize", mutates_args=())
def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, form: str, dtype: torch.dtype) -> Tensor:
    weight = QuantizedWeight(FORMATS[form], codes, scale, zero)
    if codes.is_cuda and weight.format.triton is not None and on_gpu.makes_plain(dtype):
        return on_gpu.plain_values(weight, dtype)
    native = _native(dtype, weight)
    return (
        weight.dequantize(dtype)
        if native is None
        else on_cpu.plain_values(native, codes.new_empty(weight.shape, dtype=dtype))
    )


@_dequantize.register_fake
def _dequantize_fake(codes: Tensor, scale: Tensor, zero: Tensor | None, form: str, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(QuantizedWeight(FORMATS[form], codes, scale, zero).shape, dtype=dtype)


def quantized_experts_synchronise(form: Format) -> bool:
    """Whether on a GPU the products of pairs with such weights wait for a number from the device."""
    return form.triton is None or not on_gpu.available()


def _on_gpu(x_PD: Tensor, weight: QuantizedWeight) -> bool:
    """Whether the Triton kernels multiply such activations with such a weight."""
    return x_PD.is_cuda and weight.format.triton is not None and on_gpu.serves(x_PD, weight.codes)


def _without_kernel(x_PD: Tensor, weight: QuantizedWeight) -> bool:
    """Whether few tokens, too, meet plain values where Triton does not serve."""
    return x_PD.is_cuda or weight.format.kind is None


def _tiled(x_PD: Tensor, weight: QuantizedWeight, tokens: float) -> NativeWeight | None:
    """The weight for AMX's tiles, where these multiply so many tokens of each matrix with it."""
    many = tokens >= (_TILED_4_BITS if weight.format.in_halves else _TILED_8_BITS)
    serves = many and x_PD.is_cpu and x_PD.dtype == torch.bfloat16 and tiles_serve()
    return native_weight(weight) if serves else None


def _native(dtype: torch.dtype, weight: QuantizedWeight) -> NativeWeight | None:
    """The weight for the native library, where that multiplies activations of this dtype with it."""
    return native_weight(weight) if dtype in DTYPES else None


def _by_blocks(x_PD: Tensor, weight: QuantizedWeight, *, out: Tensor | None = None) -> Tensor:
    """x @ w.T for a weight (R, D) through plain values in x's dtype, a block of rows after another."""
    rows, depth = weight.shape
    y_PR = x_PD.new_empty(x_PD.shape[0], rows) if out is None else out
    block = min(rows, max(1, _SCRATCH // max(1, depth)))
    scratch: Tensor | None = None
    for begin in range(0, rows, max(1, block)):
        own = weight.narrow(0, begin, min(block, rows - begin))
        native = _native(x_PD.dtype, own)
        if native is None:
            w_BD = own.dequantize(x_PD.dtype)
        else:
            scratch = x_PD.new_empty(block, depth) if scratch is None else scratch
            w_BD = on_cpu.plain_values(native, scratch[: own.shape[0]])
        torch.mm(x_PD, w_BD.T, out=y_PR[:, begin : begin + block])
    return y_PR


def _gathered_by_blocks(x_PD: Tensor, weight: QuantizedWeight, expert_P: Tensor) -> Tensor:
    """The gathered product without a kernel for it: in the memory of one matrix, and without waiting for a GPU."""
    y_PR = x_PD.new_zeros(x_PD.shape[0], weight.shape[1])
    if weight.shape[0] == 0:  # a rank without experts
        return y_PR
    if x_PD.is_cpu:
        for expert, own_N in pairs_by_expert(expert_P):
            y_PR[own_N] = _by_blocks(x_PD[own_N], weight[expert])
        return y_PR
    chosen_P = expert_P.clamp(min=0)
    for pair in range(x_PD.shape[0]):
        part = slice(pair, pair + 1)
        _by_blocks(x_PD[part], weight.gathered(chosen_P[part])[0], out=y_PR[part])
    return y_PR.masked_fill_(expert_P[:, None] < 0, 0)
