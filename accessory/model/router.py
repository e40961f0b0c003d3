"""The router: which experts take each token.

Shape letters: T tokens, D model width, E experts, K experts chosen for each token.
"""

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import kernels
from accessory.config import ModelArgs, MoEArgs, RouterArgs
from accessory.log import say_once
from accessory.model.balance import RouterStats
from accessory.parallel.ops import local
from accessory.parallel.state import Place
from accessory.products import linear

logger = logging.getLogger(__name__)


class Routing(NamedTuple):
    """Chosen experts of each token.

    Attributes:
        weights_TK: float32, of the chosen experts.
        experts_TK: int64 expert numbers, the most wanted first.
        probs_TE: float32, the scores over their sum; of a softmax they are its probabilities.
        logits_TE: float32, what the scores were made of.
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


def routed(logits_TE: Tensor, bias_E: Tensor | None, args: MoEArgs, active_T: Tensor | None = None) -> Routing:
    """The reference, of every setting; in PyTorch.

        score = softmax(logits) or sigmoid(logits)        over a token's experts, in float32
        chosen = the top_k of score + bias                in groups: of the experts of the best groups alone
        weight = score / (sum of the chosen ones' scores + eps) * scale

    Args:
        logits_TE: in any dtype.
        bias_E: float32; None: there is none.
        active_T: as `Router` takes it.
    """
    own, (tokens, experts) = args.router, logits_TE.shape
    logits_TE = logits_TE.float()
    score_TE = logits_TE.sigmoid() if own.score == "sigmoid" else logits_TE.softmax(-1)
    # A choice has no gradient; what is chosen has.
    wanted_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E
    if own.groups_chosen < own.groups:
        best_TG = wanted_TE.view(tokens, own.groups, -1).topk(2, dim=-1).values.sum(-1)
        open_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(
            1, best_TG.topk(own.groups_chosen, dim=-1).indices, True
        )
        wanted_TE = wanted_TE.masked_fill(~open_TG.repeat_interleave(experts // own.groups, dim=-1), float("-inf"))
    experts_TK = wanted_TE.topk(args.num_experts_per_tok, dim=-1).indices
    weights_TK = score_TE.gather(-1, experts_TK)
    if args.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + own.eps)
    probs_TE = score_TE / score_TE.sum(-1, keepdim=True) if own.score == "sigmoid" else score_TE
    asked_TK = None if active_T is None else torch.where(active_T[:, None], experts_TK, -1)
    return Routing(weights_TK * own.scale, experts_TK, probs_TE, logits_TE, asked_TK)


class Router(nn.Module):
    """Which experts take each token, on every rank alike, as `RouterArgs` and `MoEArgs` say.

    Scores are computed in float32. The product runs in the compute dtype, as most models were trained, or in float32.
    """

    def __init__(self, args: ModelArgs, place: Place) -> None:
        super().__init__()
        self.args = args.moe
        # The kernels know softmax alone, and to add weights up to 1: then they are the softmax of the chosen logits.
        self.by_kernel = args.moe.router in (RouterArgs(), RouterArgs(bias=True))
        self.weight = place.parameter(args.moe.num_experts, args.dim)
        self.bias = place.parameter(args.moe.num_experts) if args.moe.router.bias else None
        self.correction_bias: nn.Parameter | None = None
        if args.moe.router.correction:
            if args.moe.router.score == "softmax":
                say_once(logger, logging.INFO, "routers with a correction bias choose in PyTorch: no kernel knows it")
            self.correction_bias = place._replace(dtype=torch.float32).parameter(args.moe.num_experts)
            self.correction_bias.requires_grad_(False)

    def forward(self, x_TD: Tensor, active_T: Tensor | None = None) -> Routing:
        """
        Args:
            active_T: bool; tokens for which it is False are given to no expert.
        """
        if not self.by_kernel:
            x_TD = x_TD.float() if self.args.router.float32 else x_TD
            bias_E = None if self.correction_bias is None else local(self.correction_bias)
            return routed(self._logits(x_TD), bias_E, self.args, active_T)
        top_k = self.args.num_experts_per_tok
        routing = Routing(*kernels.route(self._logits(x_TD), top_k, active_T))
        if self.args.norm_topk_prob:
            return routing
        return routing._replace(weights_TK=routing.probs_TE.gather(-1, routing.experts_TK))

    def _logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = linear(x_TD, local(self.weight))
        return logits_TE if self.bias is None else logits_TE + local(self.bias).type_as(logits_TE)
