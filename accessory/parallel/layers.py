"""Linear layers and the embedding, each holding its rank's slice.

Shape letters: T tokens, D input width, O output width, V vocabulary; a trailing l marks a rank's own slice.
Parameters are created uninitialised: a loader or `init_weights` fills them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.kernels import FEW_TOKENS, few_token_linear
from accessory.parallel.ops import copy_to_region, gather_last_dim, local, reduce_from_region
from accessory.parallel.state import ParallelState, Place


def linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x @ weight.T, for a few tokens in inference through the kernel that reads the weights fastest.

    ``x`` may have more axes before D.
    """
    if x_TD.numel() <= FEW_TOKENS * x_TD.shape[-1] and not x_TD.is_cuda and not torch.is_grad_enabled():
        return few_token_linear(x_TD.flatten(0, -2), weight_OD).unflatten(0, x_TD.shape[:-1])
    return F.linear(x_TD, weight_OD)


class ColumnParallelLinear(nn.Module):
    """Output features are split over the ranks; the input must come through `copy_to_region` in training.

    Args:
        in_features, out_features: whole D, and this rank's own Ol.
    """

    def __init__(self, in_features: int, out_features: int, place: Place) -> None:
        super().__init__()
        self.weight = place.parameter(out_features, in_features)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, Ol)."""
        return linear(x_TD, local(self.weight))


class RowParallelLinear(nn.Module):
    """Input features are split over the ranks; the partial products are summed over them."""

    def __init__(self, in_features: int, out_features: int, state: ParallelState, place: Place) -> None:
        super().__init__()
        self.group = state.mp_group
        self.weight = place.parameter(out_features, in_features)

    def forward(self, x_TDl: Tensor) -> Tensor:
        """(T, Dl) -> (T, O), the same on every rank."""
        return reduce_from_region(linear(x_TDl, local(self.weight)), self.group)


class ParallelEmbedding(nn.Module):
    """Every rank looks up its slice of the width; the slices are gathered."""

    def __init__(self, vocab_size: int, dim: int, state: ParallelState, place: Place) -> None:
        super().__init__()
        self.group = state.mp_group
        self.weight = place.parameter(vocab_size, dim)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """(T,) int64 -> (T, D), the same on every rank."""
        return gather_last_dim(F.embedding(tokens_T, local(self.weight)), self.group)


class ParallelOutput(nn.Module):
    """The output head: every rank scores its slice of the vocabulary; the slices are gathered."""

    def __init__(self, dim: int, vocab_size: int, state: ParallelState, place: Place) -> None:
        super().__init__()
        self.group = state.mp_group
        self.weight = place.parameter(vocab_size, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, V), the same on every rank."""
        return gather_last_dim(linear(copy_to_region(x_TD, self.group), local(self.weight)), self.group)
