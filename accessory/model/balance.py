"""What the router does in training: how evenly it spreads the tokens, and the losses that keep it in bounds.

Shape letters: B rows, L length, T tokens, E experts; in statistics a leading layer axis may stand before E.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.config import ModelArgs
from accessory.parallel.ops import reduce_from_region


class RouterStats(NamedTuple):
    """What the router's losses need of one layer, or of several stacked along a first axis; all float32.

    Attributes:
        counts_E: pairs sent to each expert by the counted tokens, without gradient.
        probs_E: sum over the counted tokens of the router's probabilities.
        squares: sum over the counted tokens of logsumexp(router logits) squared, one number for each layer.
    """

    counts_E: Tensor
    probs_E: Tensor
    squares: Tensor

    @classmethod
    def stacked(cls, layers: Sequence[Self]) -> Self:
        """Those of each layer, put together along a first axis."""
        return cls(*map(torch.stack, zip(*layers, strict=True)))

    def summed(self, group: dist.ProcessGroup | None) -> "RouterStats":
        """Sums over the tokens of all ranks of the group, by one collective; the statistics are stacked ones."""
        experts = self.counts_E.shape[-1]
        sums = reduce_from_region(torch.cat([self.counts_E, self.probs_E, self.squares[:, None]], dim=-1), group)
        counts_LE, probs_LE, squares_L1 = sums.split([experts, experts, 1], dim=-1)
        return RouterStats(counts_LE.detach(), probs_LE, squares_L1.squeeze(-1))


class TrainingLosses(NamedTuple):
    """What a training pass over one micro-batch gives.

    Attributes:
        loss: cross-entropy, mean over this rank's learned tokens (0 where there are none), natural logarithm.
        extras: {name: (value, weight)}, to be added as value * weight; over the tokens of all data-parallel ranks.
        counts_LE: float32 (layers, experts), without gradient: pairs of token and expert over the counted tokens of
            all data-parallel ranks; zeros in layers without experts.
    """

    loss: Tensor
    extras: dict[str, tuple[Tensor, float]]
    counts_LE: Tensor


def not_padding(examples_BL: Tensor) -> Tensor:
    """Bool (B, L): the tokens that statistics count, those before each row's trailing zeros."""
    return (examples_BL != 0).flip(1).cumsum(1).flip(1) > 0


def router_losses(stats: RouterStats, args: ModelArgs) -> dict[str, tuple[Tensor, float]]:
    """{name: (value, weight)} of the router's losses; the z-loss is among them only where it has a weight."""
    top_k = args.moe.num_experts_per_tok
    losses = {"load_balancing": (load_balancing_loss(stats, top_k), args.load_balancing_weight)}
    if args.z_loss_weight > 0:
        losses["z_loss"] = (router_z_loss(stats, top_k), args.z_loss_weight)
    return losses


def load_balancing_loss(stats: RouterStats, top_k: int) -> Tensor:
    """Mean over layers of E / (N k) * sum_e count_e * mean_p_e; 1 when the experts share the tokens evenly.

    N tokens are counted, count_e of their N k pairs went to expert e, and mean_p_e is the mean of its probability
    (Fedus et al., 2021, https://arxiv.org/abs/2101.03961, for k choices; half of transformers' value, which also
    pools the layers).

    Args:
        stats: sums over all tokens that count, stacked over layers.
        top_k: experts chosen for each token.
    """
    experts = stats.counts_E.shape[-1]
    pairs = stats.counts_E.sum(-1).clamp(min=1)
    tokens = pairs / top_k
    per_layer = experts / (pairs * tokens) * (stats.counts_E * stats.probs_E).sum(-1)
    return per_layer.mean()


def router_z_loss(stats: RouterStats, top_k: int) -> Tensor:
    """Mean over layers and counted tokens of logsumexp(router logits) squared; 0 where no token counts.

    It keeps the router's logits small, in which half precision is fine (Zoph et al., 2022, equation 5,
    https://arxiv.org/abs/2202.08906).

    Args:
        stats, top_k: as in `load_balancing_loss`.
    """
    tokens = (stats.counts_E.sum(-1) / top_k).clamp(min=1)
    return (stats.squares / tokens).mean()
