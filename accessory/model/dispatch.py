"""The way of tokens to this rank's experts and back: `Dispatcher` gives each pair of a token and an expert a row of
its own, products are asked of the `Pairs` that it made, and `combine` adds up what the experts made of each token.

    pairs = dispatcher(x_TD, routing)              # gathered, grouped or trained (exchange.py: exchanged)
    y_PO = pairs.product(pairs.rows, weight_EOD)   # as often as there are matrices, adapters' too
    out_TD = pairs.combine(y_PD, weights_TK)

Shape letters: T tokens, D model width, E experts (this rank's), K experts chosen for each token, P pairs of a token and
an expert, O outputs of a product, F hidden width of an expert (this rank's slice).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory import kernels
from accessory.model.router import Routing
from accessory.model.units import silu_gate, silu_gate_backward
from accessory.products import (
    Weight,
    gathered_gate,
    gathered_linear,
    grouped_input_gradient,
    grouped_linear,
    grouped_weight_gradient,
)


class Pairs(ABC):
    """Tokens as they were dispatched: a row for each pair."""

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """Each pair's token, (P, D); made anew by every call."""

    @abstractmethod
    def product(self, x_PD: Tensor, weight_EOD: Weight) -> Tensor:
        """Each pair's row times its expert's matrix transposed; (P, O). Several axes of outputs count as one."""

    def gated(self, weight_EOD: Weight) -> Tensor:
        """`silu_gate` of the rows' product; (P, O / 2)."""
        return silu_gate(self.product(self.rows, weight_EOD))

    @abstractmethod
    def bias(self, bias_EO: Tensor, like: Tensor) -> Tensor:
        """Each pair's expert's row, zeros where the expert is on another rank; (P, O) in the dtype of ``like``."""

    @abstractmethod
    def combine(self, y_PD: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum of each token's pairs by the router's weights, in float32; (T, D) of y's dtype.

        Pairs of other ranks, and those of tokens that are given to no expert, count as zeros.
        """


class Dispatcher:
    """Dispatches tokens to the experts [first, first + count), of ``total``, that lie on this rank."""

    def __init__(self, first: int, count: int, total: int) -> None:
        self.first, self.count, self.total = first, count, total

    def __call__(self, x_TD: Tensor, routing: Routing) -> Pairs:
        """In training by `TrainedPairs`, else `GatheredPairs` where gathering pays, and `GroupedPairs`."""
        local_TK = routing.experts_TK if routing.asked_TK is None else routing.asked_TK
        if self.count < self.total:
            local_TK = local_TK - self.first
            local_TK = torch.where((local_TK >= 0) & (local_TK < self.count), local_TK, -1)
        trains = torch.is_grad_enabled()
        if not trains and kernels.gathering_pays(x_TD, local_TK.numel(), self.total):
            return GatheredPairs(x_TD, local_TK)
        complete = self.count == self.total and routing.asked_TK is None
        kind = TrainedPairs if trains else GroupedPairs
        return kind(x_TD, local_TK, self.count, complete=complete)


class GatheredPairs(Pairs):
    """Pairs in inference in the tokens' order: few, or any number where a kernel finds each expert's by itself.

    No shape depends on the choice of experts.

    Args:
        local_TK: number of each pair's expert among this rank's, -1 where it is none of them.
    """

    def __init__(self, x_TD: Tensor, local_TK: Tensor) -> None:
        self.x_TD, self.local_TK, self.expert_P = x_TD, local_TK, local_TK.flatten()

    @property
    def rows(self) -> Tensor:
        return self.x_TD.repeat_interleave(self.local_TK.shape[1], dim=0)

    def product(self, x_PD: Tensor, weight_EOD: Weight) -> Tensor:
        return gathered_linear(x_PD, weight_EOD, self.expert_P)

    def gated(self, weight_EOD: Weight) -> Tensor:
        return gathered_gate(self.x_TD, weight_EOD, self.local_TK)

    def bias(self, bias_EO: Tensor, like: Tensor) -> Tensor:
        rows_PO = bias_EO[self.expert_P.clamp(min=0)].type_as(like)
        return rows_PO.masked_fill((self.expert_P < 0)[:, None], 0)

    def combine(self, y_PD: Tensor, weights_TK: Tensor) -> Tensor:
        return kernels.sum_pairs(y_PD, weights_TK)


class GroupedPairs(Pairs):
    """Many pairs, sorted by expert, so that a product is one for each group.

    Args:
        local_TK: as for `GatheredPairs`.
        count: this rank's experts.
        complete: no number is -1, so that how many are need not be asked of the device.

    Attributes:
        order_P: places in (T, K), flattened, of the pairs.
        offsets_E: int32, where the pairs of each expert end. Behind the last one stand others' pairs, where they cannot
            be left out: what a product makes of them is meaningless, and `combine` masks it.
    """

    _waits = False  # for a GPU that says how many pairs are this rank's

    def __init__(self, x_TD: Tensor, local_TK: Tensor, count: int, *, complete: bool) -> None:
        self.x_TD, self.top_k = x_TD, local_TK.shape[1]
        expert_P = local_TK.flatten()
        expert_P, self.order_P = torch.where(expert_P < 0, count, expert_P).sort(stable=True)
        numbers_E = torch.arange(count, device=expert_P.device)
        self.offsets_E = torch.searchsorted(expert_P, numbers_E, right=True, out_int32=True)
        # Compiled code cannot ask for a number, and a GPU should not be waited for: there others' pairs stay.
        self._masks = not (complete or self._waits) and (torch.compiler.is_compiling() or x_TD.is_cuda)
        if not (complete or self._masks):
            self.order_P = self.order_P[: int(self.offsets_E[-1])]

    @property
    def rows(self) -> Tensor:
        return self.x_TD[self.order_P // self.top_k]

    def product(self, x_PD: Tensor, weight_EOD: Weight) -> Tensor:
        return grouped_linear(x_PD, weight_EOD, self.offsets_E)

    def bias(self, bias_EO: Tensor, like: Tensor) -> Tensor:
        # As a product, whose gradient is a sum in float32 and always in the same order.
        place_P1 = torch.arange(like.shape[0], device=like.device)[:, None]
        begins_E = F.pad(self.offsets_E[:-1], (1, 0))
        own_PE = (place_P1 >= begins_E) & (place_P1 < self.offsets_E)
        return own_PE.type_as(like) @ bias_EO.type_as(like)

    def combine(self, y_PD: Tensor, weights_TK: Tensor) -> Tensor:
        if self._masks:
            others_P = torch.arange(y_PD.shape[0], device=y_PD.device) >= self.offsets_E[-1]
            y_PD = y_PD.masked_fill(others_P[:, None], 0)
        return _combined(y_PD, weights_TK, self.order_P)


class TrainedPairs(GroupedPairs):
    """Grouped pairs with gradients; all of them are this rank's."""

    _waits = True

    @property
    def rows(self) -> Tensor:
        return ordered(self.x_TD, self.order_P, self.top_k)

    def combine(self, y_PD: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD: Tensor = _Combine.apply(y_PD, weights_TK, self.order_P)
        return out_TD

    def fused(self, w13_EGFD: Weight, w2_EDF: Weight, weights_TK: Tensor) -> Tensor:
        """rows, both products, `silu_gate` between them and combine in one function, which keeps little.

        Autograd would keep every intermediate of the P pairs. Kept here are the first product (P, 2 F) and nothing
        else of that size; the rest is cheap to have again.

        Args:
            w13_EGFD, w2_EDF: plain ones; w1 and w3 stacked, (E, 2, F, D).
        """
        assert isinstance(w13_EGFD, Tensor)
        out_TD: Tensor = _FusedExperts.apply(
            self.x_TD, weights_TK, w13_EGFD.flatten(1, 2), w2_EDF, self.order_P, self.offsets_E
        )
        return out_TD


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, w13_EOD: Tensor, w2: Tensor, order_P: Tensor, offsets_E: Tensor
    ) -> Tensor:
        both_PO = grouped_linear(x_TD[order_P // weights_TK.shape[1]], w13_EOD, offsets_E)
        ctx.save_for_backward(x_TD, weights_TK, w13_EOD, w2, order_P, offsets_E, both_PO)
        y_PD = grouped_linear(kernels.silu_gate_reference(both_PO), w2, offsets_E)
        return _combined(y_PD, weights_TK, order_P)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, w13_EOD, w2, order_P, offsets_E, both_PO = ctx.saved_tensors
        tokens_P = order_P // weights_TK.shape[1]
        grad_PD = grad_TD[tokens_P]
        grad_hidden_PF = grouped_input_gradient(grad_PD, w2, offsets_E)
        weight_P = weights_TK.flatten()[order_P]
        grad_both_PO, hidden_PF, grad_weight_P = silu_gate_backward(both_PO, grad_hidden_PF, weight_P)
        grad_w2 = grouped_weight_gradient(grad_PD, hidden_PF, offsets_E, like=w2)
        del grad_PD, hidden_PF, grad_hidden_PF
        grad_w13 = grouped_weight_gradient(grad_both_PO, x_TD[tokens_P], offsets_E, like=w13_EOD)
        grad_x_PD = grouped_input_gradient(grad_both_PO, w13_EOD, offsets_E)
        grad_x_TD = _sum_of_rows(grad_x_PD, order_P, weights_TK.shape)
        return grad_x_TD, _unsorted(grad_weight_P, order_P, weights_TK.shape), grad_w13, grad_w2, None, None


def ordered(x_TD: Tensor, order_P: Tensor, top_k: int = 1) -> Tensor:
    """Of places in (T, top_k), flattened and all distinct, the tokens; with gradients."""
    x_PD: Tensor = _Rows.apply(x_TD, order_P, top_k)
    return x_PD


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_P: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_P)
        ctx.pairs = (x_TD.shape[0], top_k)
        return x_TD[order_P // top_k]

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (order_P,) = ctx.saved_tensors
        return _sum_of_rows(grad_PD, order_P, ctx.pairs), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, weights_TK: Tensor, order_P: Tensor) -> Tensor:
        ctx.save_for_backward(y_PD, weights_TK, order_P)
        return _combined(y_PD, weights_TK, order_P)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_PD, weights_TK, order_P = ctx.saved_tensors
        grad_PD = grad_TD.float()[order_P // weights_TK.shape[1]]
        grad_weight_P = (grad_PD * y_PD.float()).sum(-1)
        grad_y_PD = grad_PD * weights_TK.flatten()[order_P, None]
        return grad_y_PD.to(y_PD.dtype), _unsorted(grad_weight_P, order_P, weights_TK.shape), None


def _combined(y_PD: Tensor, weights_TK: Tensor, order_P: Tensor) -> Tensor:
    return kernels.sum_pairs(_unsorted(y_PD, order_P, weights_TK.shape).flatten(0, 1), weights_TK)


def _sum_of_rows(grad_PD: Tensor, order_P: Tensor, pairs: Sequence[int]) -> Tensor:
    """Gradient of the tokens, of that of the pairs' rows: summed in float32."""
    return _unsorted(grad_PD, order_P, pairs).sum(1, dtype=torch.float32).to(grad_PD.dtype)


def _unsorted(rows: Tensor, order_P: Tensor, pairs: Sequence[int]) -> Tensor:
    """What each sorted pair has, at its place in (T, K); zeros where a pair is not among them."""
    # A scatter of distinct rows is deterministic.
    whole = rows.new_zeros(pairs[0] * pairs[1], *rows.shape[1:])
    return whole.index_copy_(0, order_P, rows).unflatten(0, pairs)
