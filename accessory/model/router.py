"""The router: which experts take each token.

Shape letters: T tokens, D model width, E experts, K experts chosen for each token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import kernels
from accessory.config import ModelArgs
from accessory.model.balance import RouterStats
from accessory.parallel.ops import local
from accessory.parallel.state import Place
from accessory.products import linear


class Routing(NamedTuple):
    """Chosen experts of each token.

    Attributes:
        weights_TK: float32, renormalised over the chosen experts, or their probabilities as they are.
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
    """Top-k of the softmax over all experts, on every rank alike; renormalised over the chosen ones, in most models.

    The product runs in the compute dtype, as the models were trained; softmax and renormalisation in float32.
    """

    def __init__(self, args: ModelArgs, place: Place) -> None:
        super().__init__()
        self.top_k, self.normalises = args.moe.num_experts_per_tok, args.moe.norm_topk_prob
        self.weight = place.parameter(args.moe.num_experts, args.dim)

    def forward(self, x_TD: Tensor, active_T: Tensor | None = None) -> Routing:
        """
        Args:
            active_T: bool; tokens for which it is False are given to no expert.
        """
        routing = Routing(*kernels.route(linear(x_TD, local(self.weight)), self.top_k, active_T))
        if self.normalises:
            return routing
        return routing._replace(weights_TK=routing.probs_TE.gather(-1, routing.experts_TK))
