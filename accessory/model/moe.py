"""The mixture of experts (Jiang et al., 2024, https://arxiv.org/abs/2401.04088): router, dispatch, experts, combine.

Shape letters: T tokens, D model width, El experts (this rank's), P pairs of a token and an expert, F hidden width of an
expert (this rank's slice under placement "tensor").
"""

from torch import Tensor, nn

from accessory import kernels
from accessory.config import ModelArgs
from accessory.model.dispatch import Dispatcher, Pairs, TrainedPairs
from accessory.model.exchange import ExchangingDispatcher
from accessory.model.gated_unit import GatedUnit
from accessory.model.router import Router, Routing
from accessory.model.units import clamped_gate, silu_gate
from accessory.parallel.ops import copy_to_region, local, reduce_from_region
from accessory.parallel.plan import Placement, local_sizes
from accessory.parallel.state import ParallelState, Place, Ranks
from accessory.quant import QuantizedParameter


class Experts(nn.Module):
    """This rank's part of a layer's experts: whole experts, or a slice of the hidden width of every expert.

    Parameters: w13 (El, 2, F, D) holds w1 and w3; w2 is (El, D, F). Where experts have biases, b13 (El, 2, F) and
    b2 (El, D), which stands inside the expert: the router's weight scales it.
    """

    def __init__(self, args: ModelArgs, state: ParallelState, placement: Placement, place: Place) -> None:
        super().__init__()
        own = local_sizes(args, state.mp_size, placement, ep_size=state.ep.size)
        experts, hidden = own["experts"], own["hidden"]
        columns = state.mp if placement == "expert" else Ranks()
        self.dispatcher: Dispatcher | ExchangingDispatcher = Dispatcher(
            experts * columns.rank, experts, args.moe.num_experts
        )
        if state.ep.size > 1:
            self.dispatcher = ExchangingDispatcher(experts, state.ep, columns)
        self.w13 = place.matrix(experts, 2, hidden, args.dim, kind="expert")
        self.w2 = place.matrix(experts, args.dim, hidden, kind="expert")
        # Where every rank holds a slice of every expert, what is whole on each has as its gradient the ranks' sum, and
        # is added by one of them; on the others it stays in the graph, since they sum its gradient together.
        self.region = state.mp_group if placement == "tensor" else None
        self.adds_whole = float(placement == "expert" or state.is_first)
        self.biased, self.clamp = args.moe.bias, args.moe.clamp
        if self.biased:
            self.b13 = place.parameter(experts, 2, hidden)
            self.b2 = place.parameter(experts, args.dim)
        # Nothing but the gated unit stands between the products.
        self.plain = not (self.biased or self.clamp)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of this rank's share of the chosen experts' outputs, in float32; (T, D) of x's dtype."""
        pairs = self.dispatcher(x_TD, routing)
        if self.plain and isinstance(pairs, TrainedPairs) and not isinstance(self.w13, QuantizedParameter):
            return pairs.fused(local(self.w13), local(self.w2), routing.weights_TK)
        hidden_PF = self.hidden(pairs)
        y_PD = self.down(hidden_PF, pairs)
        return pairs.combine(y_PD, routing.weights_TK)

    def hidden(self, pairs: Pairs) -> Tensor:
        """What the gated unit makes of [w1 x, w3 x]; (P, F)."""
        if self.plain:
            return pairs.gated(local(self.w13))
        both_PO = self.gate_up(pairs.rows, pairs)
        return silu_gate(both_PO) if self.clamp is None else clamped_gate(both_PO, self.clamp)

    def gate_up(self, x_PD: Tensor, pairs: Pairs) -> Tensor:
        """[w1 x, w3 x] of each pair's expert; (P, 2 F)."""
        both_PO = pairs.product(x_PD, local(self.w13))
        return both_PO + pairs.bias(local(self.b13).flatten(1), like=both_PO) if self.biased else both_PO

    def down(self, hidden_PF: Tensor, pairs: Pairs) -> Tensor:
        """w2 h of each pair's expert; (P, D)."""
        y_PD = pairs.product(hidden_PF, local(self.w2))
        return y_PD + self.whole_bias(local(self.b2), pairs, y_PD) if self.biased else y_PD

    def whole_bias(self, bias_ED: Tensor, pairs: Pairs, y_PD: Tensor) -> Tensor:
        """A bias that no placement cuts, of each pair's expert, once over all ranks; (P, D)."""
        return pairs.bias(copy_to_region(bias_ED, self.region), like=y_PD) * self.adds_whole

    def synchronises(self, x_TD: Tensor, pairs: int) -> bool:
        """Whether on a GPU and in inference `forward` asks the device for a number, for so many pairs.

        Args:
            x_TD: any tensor on that device and of the activations' dtype.
        """
        if isinstance(self.w13, QuantizedParameter):
            return kernels.quantized_experts_synchronise(self.w13.format)
        return kernels.plain_experts_synchronise(x_TD, pairs)


class MoE(nn.Module):
    """The feed-forward part of a block: router on every rank, experts spread over them, and the shared expert."""

    def __init__(
        self, state: ParallelState, *, gate: Router, experts: Experts, shared: GatedUnit | None = None
    ) -> None:
        super().__init__()
        self.group = state.mp_group
        self.gate, self.experts, self.shared = gate, experts, shared

    def forward(self, x_TD: Tensor, active_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(T, D) -> (T, D), the same on every rank, and how the tokens were routed.

        Args:
            active_T: bool; tokens for which it is False are given to no expert and come back as zeros.
        """
        routing = self.gate(x_TD, active_T)
        # The router and what lies before it see the whole gradient, the experts' region only a rank's part:
        # both entries into the region, tokens and weights, sum their gradients over the ranks.
        weights_TK = copy_to_region(routing.weights_TK, self.group)
        x_TD = copy_to_region(x_TD, self.group)
        y_TD = self.experts(x_TD, routing._replace(weights_TK=weights_TK))
        if self.shared is not None:
            return self.shared(x_TD, y_TD), routing
        return reduce_from_region(y_TD, self.group), routing
