"""How evenly the router spreads the tokens, and the loss that keeps it even.

Shape letters: T tokens, E experts; a leading layer axis may stand before E.
"""

from typing import NamedTuple

from torch import Tensor


class RouterStats(NamedTuple):
    """What the load-balancing loss needs of one layer, or of several stacked along a first axis.

    Attributes:
        counts_E: pairs sent to each expert by the counted tokens, float32, without gradient.
        probs_E: sum over the counted tokens of the router's probabilities, float32.
    """

    counts_E: Tensor
    probs_E: Tensor


def load_balancing_loss(stats: RouterStats, top_k: int) -> Tensor:
    """Mean over layers of E / (N k) * sum_e count_e * mean_p_e; 1 when the experts share the tokens evenly.

    N tokens are counted, count_e of their N k pairs went to expert e, and mean_p_e is the mean of its probability
    (Fedus et al., 2021, https://arxiv.org/abs/2101.03961, for k choices; half of transformers' value, which also
    pools the layers).

    Args:
        stats: counts and sums of probabilities, each (layers, experts), over all tokens that count.
        top_k: experts chosen for each token.
    """
    experts = stats.counts_E.shape[-1]
    pairs = stats.counts_E.sum(-1).clamp(min=1)
    tokens = pairs / top_k
    per_layer = experts / (pairs * tokens) * (stats.counts_E * stats.probs_E).sum(-1)
    return per_layer.mean()
