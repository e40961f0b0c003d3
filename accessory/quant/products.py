"""Products with weights, plain or quantized: one entry for each way of multiplying.

Shape letters: T tokens, P pairs of a token and its expert, D depth (inputs), O outputs, E experts.

A quantized weight never has a gradient; what it multiplies may have one (adapters above a quantized model need it).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory import kernels
from accessory.quant.weight import QuantizedWeight


def linear(x_TD: Tensor, weight_OD: Tensor | QuantizedWeight) -> Tensor:
    """x @ weight.T in x's dtype, by the fastest way for this number of tokens; x may have more axes before D."""
    if torch.is_grad_enabled():
        return (
            _FrozenLinear.apply(x_TD, weight_OD)
            if isinstance(weight_OD, QuantizedWeight)
            else F.linear(x_TD, weight_OD)
        )
    if x_TD.dim() != 2:
        return linear(x_TD.flatten(0, -2), weight_OD).unflatten(0, x_TD.shape[:-1])
    if isinstance(weight_OD, QuantizedWeight):
        native = weight_OD.native if kernels.called_directly(x_TD) else None
        return kernels.quantized_linear(x_TD, weight_OD.codes, weight_OD.scale, weight_OD.zero, native=native)
    if x_TD.shape[0] <= kernels.FEW_TOKENS and not x_TD.is_cuda:
        return kernels.few_token_linear(x_TD, weight_OD)
    return F.linear(x_TD, weight_OD)


def gathered_linear(x_PD: Tensor, weight_EOD: Tensor | QuantizedWeight, expert_P: Tensor) -> Tensor:
    """y[p] = weight[expert[p]] @ x[p], for few pairs; a negative expert gives zeros. Without a derivative.

    Here and in `grouped_linear` the outputs of a weight may be several axes, which count as one.
    """
    if isinstance(weight_EOD, QuantizedWeight):
        native = weight_EOD.native if kernels.called_directly(x_PD) else None
        codes, scale, zero = weight_EOD.codes, weight_EOD.scale, weight_EOD.zero
        return kernels.gathered_quantized_linear(x_PD, codes, scale, zero, expert_P, native=native)
    return kernels.gathered_linear(x_PD, weight_EOD.flatten(1, -2), expert_P)


def grouped_linear(x_PD: Tensor, weight_EOD: Tensor | QuantizedWeight, ends_E: Tensor) -> Tensor:
    """Rows [ends[e-1], ends[e]) of x times expert e's matrix transposed; (P, O). What is behind the last end is unset.

    Args:
        ends_E: int32.
    """
    weight_EOD = weight_EOD.flatten(1, -2)
    if isinstance(weight_EOD, QuantizedWeight):
        if torch.is_grad_enabled():
            return _FrozenGrouped.apply(x_PD, weight_EOD, ends_E)
        return kernels.grouped_quantized_linear(x_PD, weight_EOD.codes, weight_EOD.scale, weight_EOD.zero, ends_E)
    if x_PD.shape[0] == 0:
        return x_PD @ weight_EOD[0].T
    # grouped_mm wants strides in multiples of 16 bytes; only odd little shapes are padded here.
    step = 16 // x_PD.element_size()
    inputs, outputs = -x_PD.shape[1] % step, -weight_EOD.shape[1] % step
    if inputs:
        x_PD = F.pad(x_PD, (0, inputs))
    padded = F.pad(weight_EOD, (0, inputs, 0, outputs)) if inputs or outputs else weight_EOD
    return F.grouped_mm(x_PD, padded.transpose(1, 2), offs=ends_E)[:, : weight_EOD.shape[1]]


class _FrozenLinear(torch.autograd.Function):
    """Makes the weight plain for each pass, so that no plain copy of it is kept from the one to the other."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_OD: QuantizedWeight) -> Tensor:
        ctx.weight = weight_OD
        return F.linear(x_TD, weight_OD.dequantize(x_TD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, None]:
        return grad_TO @ ctx.weight.dequantize(grad_TO.dtype), None


class _FrozenGrouped(torch.autograd.Function):
    """The same for experts, one after another: only one of them is plain at a time."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, weight_EOD: QuantizedWeight, ends_E: Tensor) -> Tensor:
        ctx.weight, ctx.ends = weight_EOD, ends_E
        y_PO = x_PD.new_zeros(x_PD.shape[0], weight_EOD.shape[1])
        for expert, begin, end in _spans(ends_E):
            torch.mm(x_PD[begin:end], weight_EOD[expert].dequantize(x_PD.dtype).T, out=y_PO[begin:end])
        return y_PO

    @staticmethod
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor, None, None]:
        grad_PD = grad_PO.new_zeros(grad_PO.shape[0], ctx.weight.shape[-1])
        for expert, begin, end in _spans(ctx.ends):
            torch.mm(grad_PO[begin:end], ctx.weight[expert].dequantize(grad_PO.dtype), out=grad_PD[begin:end])
        return grad_PD, None, None


def _spans(ends_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row behind the last) of the experts that have rows."""
    ends = ends_E.tolist()
    begins = [0, *ends[:-1]]
    return [(e, begin, end) for e, (begin, end) in enumerate(zip(begins, ends, strict=True)) if end > begin]
