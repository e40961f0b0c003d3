"""Experts on other data-parallel ranks: the way of tokens there and back (Lepikhin et al., 2020,
https://arxiv.org/abs/2006.16668), beside the dispatchers of dispatch.py and called as they are.

    dispatch    a rank sorts its pairs by expert, and so by the rank that holds it; the ranks tell one another how many
                pairs each expert gets; the rows travel, and where they arrive they are sorted by expert once more
    products    grouped ones, of what has arrived from all ranks
    combine     what the experts made travels back the same way, and each token's sum is made where the token is

Another transport than torch's own would stand behind `exchange` and `exchange_counts`.

No pair is dropped. All ranks of the group take part in every exchange, whether they have tokens or not. Where the
model-parallel ranks hold different experts, each sends the pairs of its own, so that a pair travels once.

Shape letters: T tokens, D model width, K experts chosen for each token; R ranks of the group, E experts of a rank, P
pairs that this rank sends, A pairs that arrive here.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from accessory.model.dispatch import TrainedPairs, ordered
from accessory.model.router import Routing
from accessory.parallel.state import Ranks
from accessory.products import Weight


class ExchangingDispatcher:
    """Dispatches tokens to experts that are spread over the data-parallel ranks of ``ep``.

    Experts lie in blocks of ``count``: block b on rank b // columns.size of ``ep``, in column b % columns.size.

    Args:
        columns: the model-parallel ranks, where they hold different experts; else one.
    """

    def __init__(self, count: int, ep: Ranks, columns: Ranks) -> None:
        self.count, self.ep, self.columns = count, ep, columns

    def __call__(self, x_TD: Tensor, routing: Routing) -> "ExchangedPairs":
        experts_TK = routing.experts_TK if routing.asked_TK is None else routing.asked_TK
        block_TK = experts_TK.div(self.count, rounding_mode="floor")
        place_TK = block_TK // self.columns.size * self.count + experts_TK % self.count
        sends_TK = (experts_TK >= 0) & (block_TK % self.columns.size == self.columns.rank)
        return ExchangedPairs(x_TD, torch.where(sends_TK, place_TK, -1), self.count, self.ep)


class ExchangedPairs(TrainedPairs):
    """The pairs of all ranks' tokens with this rank's experts, and the way home of what is made of them.

    Args:
        place_TK: of each pair's expert among those of all ranks of the group, rank after rank; -1: not sent from here.
        count: experts of each rank.

    Attributes:
        home: the pairs of this rank's tokens, in the order in which they are sent.
    """

    def __init__(self, x_TD: Tensor, place_TK: Tensor, count: int, ep: Ranks) -> None:
        assert ep.group is not None
        self._group, self.home = ep.group, TrainedPairs(x_TD, place_TK, ep.size * count, complete=True)
        sent_RE = self.home.offsets_E.diff(prepend=self.home.offsets_E.new_zeros(1)).view(ep.size, count)
        arrived_RE = exchange_counts(sent_RE, ep.group.group_name)
        # The one time that a layer waits for the device.
        self._sent, self._arrived = torch.stack([sent_RE.sum(1), arrived_RE.sum(1)]).tolist()
        self.home.order_P = self.home.order_P[: sum(self._sent)]  # what is not sent stands behind
        rows_AD = exchange(self.home.rows, self._arrived, self._sent, ep.group)
        expert_RE = torch.arange(count, device=x_TD.device).repeat(ep.size)
        expert_A = expert_RE.repeat_interleave(arrived_RE.flatten(), output_size=sum(self._arrived))
        super().__init__(rows_AD, expert_A[:, None], count, complete=True)

    def combine(self, y_PD: Tensor, weights_TK: Tensor) -> Tensor:
        return self._back(ordered(y_PD, self.order_P.argsort()), weights_TK)

    def fused(self, w13_EGFD: Weight, w2_EDF: Weight, weights_TK: Tensor) -> Tensor:
        ones_A1 = weights_TK.new_ones(len(self.x_TD), 1)  # of what arrived, each row is a token with one expert
        return self._back(super().fused(w13_EGFD, w2_EDF, ones_A1), weights_TK)

    def _back(self, y_AD: Tensor, weights_TK: Tensor) -> Tensor:
        return self.home.combine(exchange(y_AD, self._sent, self._arrived, self._group), weights_TK)


def exchange(rows: Tensor, arrive: list[int], leave: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows that go to other ranks, one rank's after another's, for those that come from them; with gradients.

    Args:
        arrive, leave: how many from, and to, each rank.
    """
    arrived: Tensor = wait_tensor(all_to_all_single_autograd(rows, arrive, leave, group))
    return arrived


@torch.library.custom_op("accessory::exchange_counts", mutates_args=())
def exchange_counts(sent_RE: Tensor, group: str) -> Tensor:
    """How many pairs each rank sends to each expert of this one, given how many this one sends to each of theirs.

    An operator, so that recomputation can keep what it gave (`train.recompute`), and the group by its name therefore.
    """
    arrived_RE = torch.empty_like(sent_RE)
    dist.all_to_all_single(arrived_RE, sent_RE, group=_resolve_process_group(GroupName(group)))
    return arrived_RE
