"""Products with weights, plain or quantized: one entry for each way of multiplying, with gradients and without.

A quantized weight never has a gradient; what it multiplies may have one (adapters above a quantized model need it).
A plain weight of another dtype than its input is cast; its gradient comes in its own.

Shape letters: T tokens, P pairs of a token and its expert, D depth (inputs), O outputs, E experts.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory import kernels
from accessory.quant import QuantizedWeight

Weight = Tensor | QuantizedWeight


def linear(x_TD: Tensor, weight_OD: Weight) -> Tensor:
    """x @ weight.T in x's dtype, by the fastest way for this number of tokens; x may have more axes before D."""
    if isinstance(weight_OD, Tensor) and weight_OD.dtype == x_TD.dtype:
        if torch.is_grad_enabled():
            return F.linear(x_TD, weight_OD)
    elif torch.is_grad_enabled() or isinstance(weight_OD, Tensor):
        return _Product.apply(x_TD, weight_OD, None)
    if x_TD.dim() != 2:
        return linear(x_TD.flatten(0, -2), weight_OD).unflatten(0, x_TD.shape[:-1])
    if isinstance(weight_OD, QuantizedWeight):
        return kernels.quantized_linear(x_TD, weight_OD)
    if kernels.called_directly(x_TD) or (x_TD.shape[0] <= kernels.FEW_TOKENS and not x_TD.is_cuda):
        return kernels.few_token_linear(x_TD, weight_OD)
    return F.linear(x_TD, weight_OD)


def gathered_linear(x_PD: Tensor, weight_EOD: Weight, expert_P: Tensor) -> Tensor:
    """y[p] = weight[expert[p]] @ x[p], where `kernels.gathering_pays`; a negative expert gives zeros. No derivative.

    Here and in `grouped_linear` the outputs of a weight may be several axes, which count as one.
    """
    if isinstance(weight_EOD, QuantizedWeight):
        return kernels.gathered_quantized_linear(x_PD, weight_EOD, expert_P)
    weight_EOD = weight_EOD.flatten(1, -2)
    if weight_EOD.dtype == x_PD.dtype:
        return kernels.gathered_linear(x_PD, weight_EOD, expert_P)
    y_PO = x_PD.new_zeros(x_PD.shape[0], weight_EOD.shape[1])
    for expert, own_N in kernels.pairs_by_expert(expert_P):  # so that no weight is cast that nobody asks for
        y_PO[own_N] = kernels.few_token_linear(x_PD[own_N], weight_EOD[expert].to(x_PD.dtype))
    return y_PO


def gathered_gate(x_TD: Tensor, weight_EOD: Weight, expert_TK: Tensor) -> Tensor:
    """silu(first half) * second half of `gathered_linear`'s outputs for each token's K experts, (T * K, O / 2)."""
    if isinstance(weight_EOD, QuantizedWeight) or weight_EOD.dtype != x_TD.dtype:
        x_PD = x_TD.repeat_interleave(expert_TK.shape[1], dim=0)
        return kernels.silu_gate(gathered_linear(x_PD, weight_EOD, expert_TK.flatten()))
    return kernels.gathered_gate(x_TD, weight_EOD.flatten(1, -2), expert_TK)


def grouped_linear(x_PD: Tensor, weight_EOD: Weight, offsets_E: Tensor) -> Tensor:
    """Rows [offsets[e-1], offsets[e]) of x times expert e's matrix transposed, for many; (P, O) in x's dtype.

    What is behind the last offset is unset. With gradients nothing is: there offsets[-1] is P.

    Args:
        offsets_E: int32.
    """
    weight_EOD = weight_EOD.flatten(1, -2)
    if torch.is_grad_enabled():
        return _Product.apply(x_PD, weight_EOD, offsets_E)
    return _grouped(x_PD, weight_EOD, offsets_E)


def grouped_weight_gradient(grad_PO: Tensor, x_PD: Tensor, offsets_E: Tensor, *, like: Tensor) -> Tensor:
    """Gradient of `grouped_linear`'s weight, grad.T @ x over each expert's rows; shape and dtype of ``like``."""
    if _in_one_call(x_PD):
        grad_EOD = F.grouped_mm(_aligned(grad_PO, 1).T, _aligned(x_PD, 1), offs=offsets_E)
        return grad_EOD[:, : like.shape[1], : like.shape[2]].to(like.dtype)
    grad_EOD = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    for expert, rows in groups(offsets_E, empty=True):
        if like.dtype == x_PD.dtype:
            torch.mm(grad_PO[rows].T, x_PD[rows], out=grad_EOD[expert])
        else:
            grad_EOD[expert] = grad_PO[rows].T @ x_PD[rows]
    return grad_EOD


def grouped_input_gradient(grad_PO: Tensor, weight_EOD: Weight, offsets_E: Tensor) -> Tensor:
    """Gradient of `grouped_linear`'s input, grad @ weight over each expert's rows; (P, D) in the gradient's dtype."""
    if isinstance(weight_EOD, Tensor):
        return _grouped(grad_PO, weight_EOD.transpose(1, 2), offsets_E)
    return _one_by_one(grad_PO, weight_EOD, offsets_E, transposed=True)


def _grouped(x_PD: Tensor, weight_EOD: Weight, offsets_E: Tensor) -> Tensor:
    if isinstance(weight_EOD, QuantizedWeight):
        return kernels.grouped_quantized_linear(x_PD, weight_EOD, offsets_E)
    if _in_one_call(x_PD):
        weight_EDO = _aligned(weight_EOD.to(x_PD.dtype), 2).transpose(1, 2)
        return F.grouped_mm(_aligned(x_PD, 1), weight_EDO, offs=offsets_E)[:, : weight_EOD.shape[1]]
    return _one_by_one(x_PD, weight_EOD, offsets_E)


def _in_one_call(x_PD: Tensor) -> bool:
    """Whether PyTorch's grouped_mm is taken: it asks the device for nothing, as is needed there and in compiled code.

    On a CPU it is no faster than one product after another, which casts each expert's weights where they then lie in
    the cache.
    """
    return x_PD.shape[0] > 0 and (kernels.on_gpu(x_PD) or torch.compiler.is_compiling())


def _aligned(x: Tensor, axes: int) -> Tensor:
    """The last axes filled up with zeros to multiples of 16 bytes, as grouped_mm wants: only odd little shapes."""
    missing = [-size % (16 // x.element_size()) for size in x.shape[-axes:]]
    return F.pad(x, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else x


def _one_by_one(x_PD: Tensor, weight_EOD: Weight, offsets_E: Tensor, *, transposed: bool = False) -> Tensor:
    """The grouped product, expert after expert: only one of them is cast, or made plain, at a time.

    Args:
        transposed: x @ weight, in place of x @ weight.T.
    """
    if not transposed and isinstance(weight_EOD, Tensor):
        tiled_PO = kernels.grouped_by_tiles(x_PD, weight_EOD, offsets_E)
        if tiled_PO is not None:
            return tiled_PO
    y_PO = x_PD.new_empty(x_PD.shape[0], weight_EOD.shape[-1 if transposed else 1])
    for expert, rows in groups(offsets_E):
        weight_OD = _plain(weight_EOD[expert], x_PD.dtype)
        torch.mm(x_PD[rows], weight_OD if transposed else weight_OD.T, out=y_PO[rows])
    return y_PO


def groups(offsets_E: Tensor, *, empty: bool = False) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows; those without rows only where ``empty``."""
    begin = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > begin or empty:
            yield expert, slice(begin, end)
        begin = end


def _plain(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else kernels.dequantize(weight, dtype)


class _Product(torch.autograd.Function):
    """With a weight that is cast or made plain for each pass anew, or of groups: keeps no copy of the weight, and the
    input only where the weight's gradient will be asked for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, offsets_E: Tensor | None) -> Tensor:
        plain = isinstance(weight, Tensor)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if plain else None, offsets_E)
        ctx.quantized = None if plain else weight
        if offsets_E is None:
            return F.linear(x, _plain(weight, x.dtype))
        # On a CPU a quantized weight may be multiplied in 8 bits, of which the gradient would know nothing.
        return _grouped(x, weight, offsets_E) if plain or x.is_cuda else _one_by_one(x, weight, offsets_E)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, plain, offsets_E = ctx.saved_tensors
        weight, grouped = ctx.quantized if plain is None else plain, offsets_E is not None
        grad = grad.contiguous() if grouped else grad
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_input_gradient(grad, weight, offsets_E) if grouped else grad @ _plain(weight, grad.dtype)
        if ctx.needs_input_grad[1] and grouped:
            grad_weight = grouped_weight_gradient(grad, x, offsets_E, like=plain)
        elif ctx.needs_input_grad[1]:
            grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(plain.dtype)
        return grad_x, grad_weight, None
