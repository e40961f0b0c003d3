"""The experts' products in training: grouped by expert, and with little kept for the backward pass.

Autograd would keep every intermediate of the P pairs: the rows themselves, both halves, their product, the outputs
in float32. Kept here are the first product (P, 2 F) and nothing else of that size; the rest is cheap to have again.

Shape letters: T tokens, D model width, E experts (this rank's), K experts chosen for each token, P pairs of a token
and an expert of this rank, sorted by expert, F hidden width of an expert (this rank's slice), O output width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Pairs whose gate and up parts are worked on at once: a block of them fits the cache.
_BLOCK = 128


def experts_product(
    x_TD: Tensor, weights_TK: Tensor, w13_EGFD: Tensor, w2_EDF: Tensor, order_P: Tensor, ends_E: Tensor
) -> Tensor:
    """Weighted sum over the chosen experts of w2 (silu(w1 x) * w3 x); (T, D) in float32, with gradients.

    Products run in x's dtype; weights in another one are cast expert by expert, their gradients come in their own.

    Args:
        weights_TK: the router's weight of each pair.
        w13_EGFD: w1 and w3 stacked, (E, 2, F, D).
        order_P: place of each pair in the flattened (T, K), sorted by expert; pairs of other ranks are not in it.
        ends_E: int32, where each expert's pairs end in order_P.
    """
    y_TD: Tensor = _ExpertsProduct.apply(x_TD, weights_TK, w13_EGFD, w2_EDF, order_P, ends_E)
    return y_TD


class _ExpertsProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, order_P: Tensor, ends_E: Tensor
    ) -> Tensor:
        top_k = weights_TK.shape[1]
        x_PD = x_TD[order_P // top_k]
        both_PO = grouped_product(x_PD, w13.flatten(1, 2), ends_E)
        y_PD = grouped_product(_gated(both_PO), w2, ends_E)
        ctx.save_for_backward(x_TD, weights_TK, w13, w2, order_P, ends_E, both_PO)
        return _summed(y_PD, weights_TK, order_P)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, w13, w2, order_P, ends_E, both_PO = ctx.saved_tensors
        tokens_P = order_P // weights_TK.shape[1]
        grad_PD = grad_TD.to(x_TD.dtype)[tokens_P]
        grad_hidden_PF = grouped_product(grad_PD, w2.transpose(1, 2), ends_E)
        weight_P = weights_TK.flatten()[order_P]
        grad_both_PO, hidden_PF, grad_weight_P = _gated_backward(both_PO, grad_hidden_PF, weight_P)
        grad_w2 = grouped_weight_gradient(grad_PD, hidden_PF, ends_E, like=w2)
        del grad_PD, hidden_PF, grad_hidden_PF
        grad_w13 = grouped_weight_gradient(grad_both_PO, x_TD[tokens_P], ends_E, like=w13.flatten(1, 2))
        grad_x_PD = grouped_product(grad_both_PO, w13.flatten(1, 2).transpose(1, 2), ends_E)
        grad_x_TD = _scattered(grad_x_PD, order_P, weights_TK.shape).sum(1, dtype=torch.float32).to(x_TD.dtype)
        grad_weights_TK = torch.zeros_like(weights_TK).flatten().index_copy(0, order_P, grad_weight_P)
        return grad_x_TD, grad_weights_TK.view_as(weights_TK), grad_w13.view_as(w13), grad_w2, None, None


def differentiable_product(x_PD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_product` with gradients; ``x`` is kept only where the weight's gradient will be asked for."""
    y_PO: Tensor = _GroupedProduct.apply(x_PD, weight_EOD, ends_E)
    return y_PO


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_PD if ctx.needs_input_grad[1] else None, weight_EOD, ends_E)
        return grouped_product(x_PD, weight_EOD, ends_E)

    @staticmethod
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_PD, weight_EOD, ends_E = ctx.saved_tensors
        grad_PO = grad_PO.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_product(grad_PO, weight_EOD.transpose(1, 2), ends_E)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_weight_gradient(grad_PO, x_PD, ends_E, like=weight_EOD)
        return grad_x, grad_weight, None


def pair_rows(x_TD: Tensor, order_P: Tensor, top_k: int) -> Tensor:
    """The token of each sorted pair, (P, D), with gradients that are summed in float32."""
    x_PD: Tensor = _PairRows.apply(x_TD, order_P, top_k)
    return x_PD


class _PairRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_P: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_P)
        ctx.pairs = (x_TD.shape[0], top_k)
        return x_TD[order_P // top_k]

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (order_P,) = ctx.saved_tensors
        grad_TKD = _scattered(grad_PD, order_P, ctx.pairs)
        return grad_TKD.sum(1, dtype=torch.float32).to(grad_PD.dtype), None, None


def gated(both_PO: Tensor) -> Tensor:
    """silu(first half) * second half, with gradients; of all of it ``both`` alone is kept."""
    hidden_PF: Tensor = _Gated.apply(both_PO)
    return hidden_PF


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_PO: Tensor) -> Tensor:
        ctx.save_for_backward(both_PO)
        return _gated(both_PO)

    @staticmethod
    def backward(ctx: Any, grad_PF: Tensor) -> Tensor:
        (both_PO,) = ctx.saved_tensors
        ones_P = torch.ones(both_PO.shape[0], device=both_PO.device)
        return _gated_backward(both_PO, grad_PF, ones_P)[0]


def weighted_sum(y_PD: Tensor, weights_TK: Tensor, order_P: Tensor) -> Tensor:
    """Sum of each token's pairs by the router's weights; (T, D) in float32, with gradients."""
    out_TD: Tensor = _WeightedSum.apply(y_PD, weights_TK, order_P)
    return out_TD


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, weights_TK: Tensor, order_P: Tensor) -> Tensor:
        ctx.save_for_backward(y_PD, weights_TK, order_P)
        return _summed(y_PD, weights_TK, order_P)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_PD, weights_TK, order_P = ctx.saved_tensors
        grad_PD = grad_TD[order_P // weights_TK.shape[1]]
        grad_weight_P = (grad_PD * y_PD.float()).sum(-1)
        grad_weights_TK = torch.zeros_like(weights_TK).flatten().index_copy(0, order_P, grad_weight_P)
        grad_y_PD = grad_PD * weights_TK.flatten()[order_P, None]
        return grad_y_PD.to(y_PD.dtype), grad_weights_TK.view_as(weights_TK), None


def grouped_product(x_PD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """Rows [ends[e-1], ends[e]) of ``x`` times expert e's matrix transposed; (P, O) in x's dtype."""
    if _in_one_call(x_PD, weight_EOD):
        return F.grouped_mm(x_PD, weight_EOD.to(x_PD.dtype).transpose(1, 2), offs=ends_E)
    # One product after another: each expert's weights are cast where they then lie in the cache.
    y_PO = x_PD.new_empty(x_PD.shape[0], weight_EOD.shape[1])
    for expert, (begin, end) in enumerate(_spans(ends_E)):
        if end > begin:
            torch.mm(x_PD[begin:end], weight_EOD[expert].to(x_PD.dtype).T, out=y_PO[begin:end])
    return y_PO


def grouped_weight_gradient(grad_PO: Tensor, x_PD: Tensor, ends_E: Tensor, *, like: Tensor) -> Tensor:
    """Gradient of `grouped_product`'s weights, grad.T @ x over each expert's rows; shape and dtype of ``like``."""
    if _in_one_call(x_PD, like):
        return F.grouped_mm(grad_PO.T, x_PD, offs=ends_E).to(like.dtype)
    grad_EOD = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    for expert, (begin, end) in enumerate(_spans(ends_E)):
        if end == begin:
            grad_EOD[expert] = 0
        elif like.dtype == x_PD.dtype:
            torch.mm(grad_PO[begin:end].T, x_PD[begin:end], out=grad_EOD[expert])
        else:
            grad_EOD[expert] = grad_PO[begin:end].T @ x_PD[begin:end]
    return grad_EOD


def _gated(both_PO: Tensor) -> Tensor:
    """silu(first half) * second half."""
    gate_PF, up_PF = both_PO.chunk(2, dim=-1)
    return F.silu(gate_PF).mul_(up_PF)


def _gated_backward(both_PO: Tensor, grad_PF: Tensor, weight_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Through the gate, in float32.

    Args:
        grad_PF: gradient of the hidden layer before the pair's weight.

    Returns:
        Gradient of both halves (P, 2 F); the hidden layer times the pair's weight (P, F); gradient of the weight (P,).
    """
    grad_both_PO, hidden_PF = torch.empty_like(both_PO), torch.empty_like(grad_PF)
    grad_weight_P = torch.empty(weight_P.shape, dtype=torch.float32, device=weight_P.device)
    block = both_PO.shape[0] if both_PO.is_cuda else _BLOCK
    for begin in range(0, both_PO.shape[0], max(1, block)):
        rows = slice(begin, begin + block)
        gate, up = both_PO[rows].float().chunk(2, dim=-1)
        grad, weight = grad_PF[rows].float(), weight_P[rows, None]
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        grad_weight_P[rows] = (grad * hidden).sum(-1)
        hidden_PF[rows] = hidden.mul_(weight)
        grad = grad.mul_(weight)
        grad_gate, grad_up = grad_both_PO[rows].chunk(2, dim=-1)
        grad_up.copy_(grad * silu)
        # silu' = sigmoid * (1 + gate - silu)
        grad_gate.copy_(grad.mul_(up).mul_(sigmoid).mul_(gate.sub_(silu).add_(1)))
    return grad_both_PO, hidden_PF, grad_weight_P


def _summed(y_PD: Tensor, weights_TK: Tensor, order_P: Tensor) -> Tensor:
    # Undo the sort by a scatter of distinct rows: deterministic, and rows of other ranks stay zero.
    y_TKD = _scattered(y_PD, order_P, weights_TK.shape)
    out_TD = torch.zeros(weights_TK.shape[0], y_PD.shape[1], dtype=torch.float32, device=y_PD.device)
    for choice in range(weights_TK.shape[1]):
        out_TD.addcmul_(y_TKD[:, choice].float(), weights_TK[:, choice, None])
    return out_TD


def _scattered(rows_PD: Tensor, order_P: Tensor, pairs: Sequence[int]) -> Tensor:
    """Rows at their pairs' places, (T, K, D) for ``pairs`` (T, K); zeros where no row is."""
    whole = rows_PD.new_zeros(math.prod(pairs), rows_PD.shape[-1])
    return whole.index_copy_(0, order_P, rows_PD).unflatten(0, pairs)


def _spans(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _in_one_call(x_PD: Tensor, weight_EOD: Tensor) -> bool:
    """Whether grouped_mm serves: on a GPU, for strides in multiples of 16 bytes (all but odd little shapes)."""
    return x_PD.is_cuda and x_PD.shape[0] > 0 and all(n * x_PD.element_size() % 16 == 0 for n in weight_EOD.shape[1:])
