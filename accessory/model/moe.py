"""The mixture of experts: router, experts and the two ways of running them (Jiang et al., 2024,
https://arxiv.org/abs/2401.04088).

Shape letters: T tokens, D model width, E experts (El: this rank's), K experts chosen for each token, P = T * K
pairs of token and chosen expert, F hidden width of an expert (this rank's slice under placement "tensor").
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import kernels
from accessory.config import ModelArgs
from accessory.model.balance import RouterStats
from accessory.model.expert_products import experts_product, gated, pair_rows, weighted_sum
from accessory.model.pair_products import GatheredPairs, GroupedPairs, TrainedPairs, Way
from accessory.parallel.ops import copy_to_region, local, reduce_from_region
from accessory.parallel.plan import Placement, local_sizes
from accessory.parallel.state import ParallelState, Place
from accessory.quant import QuantizedParameter, linear


class Routing(NamedTuple):
    """Chosen experts of each token.

    Attributes:
        weights_TK: float32, renormalised over the chosen experts.
        experts_TK: int64 expert numbers, the most probable first.
        probs_TE: float32 softmax over all experts.
        logits_TE: float32, what the softmax was taken of.
        asked_TK: the experts, but -1 for tokens that are given to none; None: each is given to its experts.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    asked_TK: Tensor | None = None

    def stats(self, counted_T: Tensor | None) -> RouterStats:
        """Sums over the tokens that count (None: all do)."""
        experts = self.probs_TE.shape[-1]
        chosen_TE = F.one_hot(self.experts_TK, experts).sum(1).float()
        weight_T = torch.ones_like(chosen_TE[:, 0]) if counted_T is None else counted_T.float()
        squares_T = self.logits_TE.logsumexp(-1).square()
        return RouterStats(weight_T @ chosen_TE, weight_T @ self.probs_TE, weight_T @ squares_T)


class Router(nn.Module):
    """Top-k of the softmax over all experts, renormalised over the chosen ones; on every rank alike.

    The product runs in the compute dtype, as the models were trained; softmax and renormalisation in float32.
    """

    def __init__(self, args: ModelArgs, place: Place) -> None:
        super().__init__()
        self.top_k = args.moe.num_experts_per_tok
        self.weight = place.parameter(args.moe.num_experts, args.dim)

    def forward(self, x_TD: Tensor, active_T: Tensor | None = None) -> Routing:
        """
        Args:
            active_T: bool; tokens for which it is False are given to no expert.
        """
        logits_TE = linear(x_TD, local(self.weight).type_as(x_TD))
        return Routing(*kernels.route(logits_TE, self.top_k, active_T))


class Experts(nn.Module):
    """This rank's part of a layer's experts: whole experts, or a slice of the hidden width of every expert.

    Parameters: w13 (El, 2, F, D) holds w1 and w3; w2 is (El, D, F).
    """

    def __init__(self, args: ModelArgs, state: ParallelState, placement: Placement, place: Place) -> None:
        super().__init__()
        own = local_sizes(args, state.mp_size, placement)
        experts, hidden = own["experts"], own["hidden"]
        self.count = experts
        self.first_expert = experts * state.mp_rank if placement == "expert" else 0
        self.owns_all = experts == args.moe.num_experts
        self.w13 = place.matrix(experts, 2, hidden, args.dim)
        self.w2 = place.matrix(experts, args.dim, hidden)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, *, skips: bool) -> Tensor:
        """Weighted sum of this rank's share of the chosen experts' outputs, in float32; (T, D) of x's dtype.

        Args:
            skips: there may be negative expert numbers, for pairs that are not to be computed.
        """
        complete = self.owns_all and not skips
        if torch.is_grad_enabled():
            order_P, ends_E = self._sorted(experts_TK)
            own_P = order_P if complete else order_P[: int(ends_E[-1])]
            return self.trained(x_TD, weights_TK, own_P, ends_E).type_as(x_TD)
        if kernels.gathering_pays(x_TD, experts_TK.numel()):
            y_PD = self._gathered(x_TD, experts_TK.flatten())
        else:
            y_PD = self._grouped(x_TD, experts_TK, complete=complete)
        return kernels.sum_pairs(y_PD, weights_TK)

    def synchronises(self, x_TD: Tensor, pairs: int) -> bool:
        """Whether on a GPU and in inference `forward` asks the device for a number, for so many pairs.

        Args:
            x_TD: any tensor on that device and of the activations' dtype.
        """
        if isinstance(self.w13, QuantizedParameter) and kernels.quantized_experts_synchronise():
            return True
        return self.has_plain_matrices and kernels.plain_experts_synchronise(x_TD, pairs)

    @property
    def has_plain_matrices(self) -> bool:
        """Whether a product with a weight that is not quantized is among the experts'."""
        return not isinstance(self.w13, QuantizedParameter)

    def trained(self, x_TD: Tensor, weights_TK: Tensor, order_P: Tensor, ends_E: Tensor) -> Tensor:
        """`forward` with gradients, for pairs that are sorted by expert; (T, D) in float32."""
        w13, w2 = local(self.w13), local(self.w2)
        if isinstance(w13, Tensor) and isinstance(w2, Tensor):
            return experts_product(x_TD, weights_TK, w13, w2, order_P, ends_E)
        return self._trained_apart(x_TD, weights_TK, order_P, ends_E)

    def _trained_apart(self, x_TD: Tensor, weights_TK: Tensor, order_P: Tensor, ends_E: Tensor) -> Tensor:
        """The same through products with gradients of their own, around which more may be computed."""
        way = TrainedPairs(ends_E)
        both_PO = self.first(pair_rows(x_TD, order_P, weights_TK.shape[1]), way)
        return weighted_sum(self.second(gated(both_PO), way), weights_TK, order_P)

    def first(self, x_PD: Tensor, way: Way) -> Tensor:
        """What w1 and w3 make of each pair, side by side; (P, 2 F)."""
        return way.product(x_PD, local(self.w13))

    def second(self, hidden_PF: Tensor, way: Way) -> Tensor:
        """What w2 makes of each pair; (P, D)."""
        return way.product(hidden_PF, local(self.w2))

    def _gathered(self, x_TD: Tensor, experts_P: Tensor) -> Tensor:
        """Few tokens: read only the chosen experts' rows; shapes do not depend on the choice."""
        if not self.owns_all:
            local_P = experts_P - self.first_expert
            experts_P = torch.where((local_P >= 0) & (local_P < self.count), local_P, -1)
        way = GatheredPairs(experts_P)
        x_PD = x_TD.repeat_interleave(experts_P.shape[0] // x_TD.shape[0], dim=0)
        return self.second(kernels.silu_gate(self.first(x_PD, way)), way)

    def _sorted(self, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Places of all pairs in (T, K) sorted by expert, and where each of this rank's experts' pairs end (int32).

        Pairs of other ranks, and skipped ones, stand behind this rank's own.
        """
        local_P = experts_TK.flatten() - self.first_expert
        local_P = torch.where((local_P >= 0) & (local_P < self.count), local_P, self.count)
        counts_E = F.one_hot(local_P, self.count + 1).sum(0)[: self.count]
        return local_P.argsort(stable=True), counts_E.cumsum(0).to(torch.int32)

    def _grouped(self, x_TD: Tensor, experts_TK: Tensor, *, complete: bool) -> Tensor:
        """Many tokens in inference: sort the pairs by expert, one product for each group.

        Args:
            complete: every pair is this rank's to compute, so their number need not be asked of the device.
        """
        order_P, ends_E = self._sorted(experts_TK)
        # Compiled code may not ask for that number, and a GPU should not be waited for: there the foreign rows go
        # through no group's product and are masked instead.
        static = torch.compiler.is_compiling() or x_TD.is_cuda
        if not complete and not static:
            order_P = order_P[: int(ends_E[-1])]
        x_PD = x_TD[order_P // experts_TK.shape[1]]
        way = GroupedPairs(ends_E)
        y_PD = self.second(kernels.silu_gate(self.first(x_PD, way)), way)
        if not complete and static:
            own_P = torch.arange(y_PD.shape[0], device=y_PD.device) < ends_E[-1]
            y_PD = y_PD.masked_fill(~own_P[:, None], 0)
        # Undo the sort by a scatter of distinct rows: deterministic, and rows of other ranks stay zero.
        return y_PD.new_zeros(experts_TK.numel(), y_PD.shape[-1]).index_copy(0, order_P, y_PD)


class MoE(nn.Module):
    """The feed-forward part of a block: router on every rank, experts spread over them."""

    def __init__(self, args: ModelArgs, state: ParallelState, placement: Placement, place: Place) -> None:
        super().__init__()
        self.group = state.mp_group
        self.gate = Router(args, place)
        self.experts = Experts(args, state, placement, place)

    def forward(self, x_TD: Tensor, active_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(T, D) -> (T, D), the same on every rank, and how the tokens were routed.

        Args:
            active_T: bool; tokens for which it is False are given to no expert and come back as zeros.
        """
        routing = self.gate(x_TD, active_T)
        # The router and what lies before it see the whole gradient, the experts' region only a rank's part:
        # both entries into the region, tokens and weights, sum their gradients over the ranks.
        y_TD = self.experts(
            copy_to_region(x_TD, self.group),
            copy_to_region(routing.weights_TK, self.group),
            routing.experts_TK if routing.asked_TK is None else routing.asked_TK,
            skips=active_T is not None,
        )
        return reduce_from_region(y_TD, self.group), routing
