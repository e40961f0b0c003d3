"""The gated unit through which every token goes: a layer without experts, or the expert that all tokens share.

Shape letters: T tokens, D model width, O = 2 F for F hidden width (this rank's slice).
"""

import torch
from torch import Tensor, nn

from accessory.model.units import silu_gate
from accessory.parallel.layers import Linears
from accessory.parallel.ops import copy_to_region
from accessory.parallel.state import ParallelState, Place


class GatedUnit(nn.Module):
    """w2 (silu(w1 x) * w3 x), cut along its hidden width.

    Args:
        hidden: this rank's slice of the width.
    """

    def __init__(self, dim: int, hidden: int, state: ParallelState, place: Place, layers: Linears) -> None:
        super().__init__()
        self.group = state.mp_group
        self.w1 = layers.column(dim, hidden, place)
        self.w3 = layers.column(dim, hidden, place)
        self.w2 = layers.row(hidden, dim, state, place)

    def forward(self, x_TD: Tensor, beside_TD: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, D), the same on every rank; what enters must come through `copy_to_region` in training.

        Args:
            beside_TD: this rank's summand of something that is to be added: one sum over the ranks is for both.
        """
        both_TO = torch.cat((self.w1(x_TD), self.w3(x_TD)), dim=-1)
        y_TD: Tensor = self.w2(silu_gate(both_TO), beside_TD)
        return y_TD


class Dense(GatedUnit):
    """The feed-forward part of a block without experts, called as `MoE` is."""

    def forward(self, x_TD: Tensor, active_T: Tensor | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        """(T, D) -> (T, D), the same on every rank and whether a token is active or not; nothing was routed."""
        del active_T
        return super().forward(copy_to_region(x_TD, self.group)), None
