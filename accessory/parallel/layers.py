"""Linear layers and the embedding, each holding its rank's slice.

Shape letters: T tokens, D input width, O output width, V vocabulary; a trailing l marks a rank's own slice.
Parameters are created uninitialised: a loader or `init_weights` fills them. Products run in the dtype of what comes in.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.parallel.ops import copy_to_region, gather_last_dim, local, reduce_from_region
from accessory.parallel.state import ParallelState, Place
from accessory.products import linear


class ColumnParallelLinear(nn.Module):
    """Output features are split over the ranks; the input must come through `copy_to_region` in training.

    Args:
        in_features, out_features: whole D, and this rank's own Ol.
    """

    def __init__(self, in_features: int, out_features: int, place: Place) -> None:
        super().__init__()
        self.weight = place.matrix(out_features, in_features)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, Ol)."""
        return linear(x_TD, local(self.weight))


class RowParallelLinear(nn.Module):
    """Input features are split over the ranks; the partial products are summed over them."""

    def __init__(self, in_features: int, out_features: int, state: ParallelState, place: Place) -> None:
        super().__init__()
        self.group = state.mp_group
        self.weight = place.matrix(out_features, in_features)

    def forward(self, x_TDl: Tensor, beside_TO: Tensor | None = None) -> Tensor:
        """(T, Dl) -> (T, O), the same on every rank.

        Args:
            beside_TO: this rank's summand of something that is to be added.
        """
        y_TO = self.partial(x_TDl)
        return reduce_from_region(y_TO if beside_TO is None else y_TO + beside_TO, self.group)

    def partial(self, x_TDl: Tensor) -> Tensor:
        """This rank's summand of the output."""
        return linear(x_TDl, local(self.weight))


class Linears(NamedTuple):
    """Which classes a part of a block has its linear layers of; called as these are."""

    column: Callable[[int, int, Place], ColumnParallelLinear] = ColumnParallelLinear
    row: Callable[[int, int, ParallelState, Place], RowParallelLinear] = RowParallelLinear


class ParallelEmbedding(nn.Module):
    """Every rank looks up its slice of the width; the slices are gathered.

    Attributes:
        dtype: of what comes out; None: the weight's.
    """

    def __init__(self, vocab_size: int, dim: int, state: ParallelState, place: Place) -> None:
        super().__init__()
        self.group = state.mp_group
        self.dtype: torch.dtype | None = None
        self.weight = place.parameter(vocab_size, dim)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """(T,) int64 -> (T, D), the same on every rank."""
        x_TDl = F.embedding(tokens_T, local(self.weight))
        return gather_last_dim(x_TDl if self.dtype is None else x_TDl.to(self.dtype), self.group)


class ParallelOutput(nn.Module):
    """The output head: every rank scores its slice of the vocabulary; the slices are gathered.

    Args:
        vocab_size: this rank's own rows.
        n_tokens: of all rows, those that are tokens, the first ones; the scores of the others, which pad the
            vocabulary, are cut off or -infinity. None: every row is one.

    Attributes:
        gaps: int64; which of the first rows are no tokens after all: their scores are -infinity.
    """

    def __init__(
        self, dim: int, vocab_size: int, state: ParallelState, place: Place, *, n_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.group, self.n_tokens = state.mp_group, n_tokens
        self.gaps: Tensor | None = None
        self.weight = place.matrix(vocab_size, dim, kind="head")

    def forward(self, x_TD: Tensor, *, cuts: bool = True) -> Tensor:
        """(T, D) -> (T, V), the same on every rank; where padding is not cut off, its scores are -infinity."""
        logits_TV = gather_last_dim(self.scores(copy_to_region(x_TD, self.group)), self.group)
        if self.n_tokens is not None and cuts:
            logits_TV = logits_TV[..., : self.n_tokens]
        elif self.n_tokens is not None:
            logits_TV[..., self.n_tokens :].fill_(float("-inf"))
        # In place, since logits may be the largest tensor of all; no backward pass needs what stood there.
        return logits_TV if self.gaps is None else logits_TV.index_fill_(-1, self.gaps, float("-inf"))

    def scores(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, Vl), of this rank's own rows."""
        return linear(x_TD, local(self.weight))
