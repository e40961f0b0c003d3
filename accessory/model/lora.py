"""Adapters: biases and low-rank updates beside frozen matrices (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

Output = W x + bias + (lora_alpha / rank) lora_b (lora_a x). Each class here is a layer of the plain model with
such parameters beside its own; a model has them that is built of `adapted_layers`.

Between `copy_to_region` and `reduce_from_region` a rank sees but a part of every gradient. An adapter that all ranks
hold alike, and use there, goes through `copy_to_region` itself, which gives it the sum.

Shape letters: as in model/moe.py, and r the rank; a trailing l marks a rank's own slice.
"""

import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import kernels
from accessory.config import ModelArgs, PeftArgs
from accessory.model.dispatch import Pairs
from accessory.model.layers import Layers
from accessory.model.moe import Experts
from accessory.model.router import Router
from accessory.parallel.box import Box
from accessory.parallel.layers import ColumnParallelLinear, Linears, ParallelOutput, RowParallelLinear
from accessory.parallel.ops import copy_to_region, local
from accessory.parallel.plan import Placement, parameter_shapes
from accessory.parallel.state import ParallelState, Place
from accessory.products import linear

_INITIAL_STD = 0.02


def adapted_layers(peft: PeftArgs, state: ParallelState, place: Place) -> Layers:
    """For a model that has adapters.

    Args:
        place: of the adapters, whose dtype may be another than the layers'.
    """
    own: dict[str, Any] = {"peft": peft, "adapters": place}
    region = own | {"region": state.mp_group}

    def linears(kind: str) -> Linears:
        return Linears(
            partial(AdaptedColumnLinear, kind=kind, **region), partial(AdaptedRowLinear, kind=kind, **region)
        )

    return Layers(
        attention=linears("attention"),
        router=partial(AdaptedRouter, kind="router", **region),
        experts=partial(AdaptedExperts, **own),
        shared=linears("shared"),
        dense=linears("dense"),
        output=partial(AdaptedOutput, kind="head", **region),
    )


class _LowRank(nn.Module):
    """One of the two matrices of an update, under the name that checkpoints give it."""

    def __init__(self, out_features: int, in_features: int, place: Place) -> None:
        super().__init__()
        self.weight = place.parameter(out_features, in_features)


class _Updated(nn.Module):
    """A matrix's low-rank update; made as the plain layer is.

    Args:
        kind: of matrices, as `PeftArgs` knows them.
    """

    weight: Any

    def __init__(
        self, *plain: Any, kind: str, peft: PeftArgs, adapters: Place, region: dist.ProcessGroup | None, **more: Any
    ) -> None:
        super().__init__(*plain, **more)
        out_features, in_features = self.weight.shape
        self.peft, self.region = peft, region
        self.updated = (rank := peft.rank_of(kind)) > 0
        if self.updated:
            self.scale = peft.scale_of(kind)
            self.lora_a = _LowRank(rank, in_features, adapters)
            self.lora_b = _LowRank(out_features, rank, adapters)

    def _update(self, x_TD: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        inner_Tr = linear(F.dropout(x_TD, self.peft.lora_dropout, self.training), lora_a)
        return linear(inner_Tr * self.scale, lora_b)


class _AdaptedLinear(_Updated):
    """The same, and a bias."""

    def __init__(self, *plain: Any, peft: PeftArgs, adapters: Place, **more: Any) -> None:
        super().__init__(*plain, peft=peft, adapters=adapters, **more)
        self.bias = adapters.parameter(self.weight.shape[0]) if peft.bias_tuning else None

    def _with_bias(self, y_TO: Tensor) -> Tensor:
        return y_TO if self.bias is None else y_TO + local(self.bias).type_as(y_TO)


class AdaptedColumnLinear(_AdaptedLinear, ColumnParallelLinear):
    """Rows are split over the ranks: lora_a is whole on each, lora_b and the bias are split."""

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TO = ColumnParallelLinear.forward(self, x_TD)
        if self.updated:
            lora_a = copy_to_region(local(self.lora_a.weight), self.region)
            y_TO = y_TO + self._update(x_TD, lora_a, local(self.lora_b.weight))
        return self._with_bias(y_TO)


class AdaptedRowLinear(_AdaptedLinear, RowParallelLinear):
    """Columns are split over the ranks: lora_a is split, lora_b whole on each; the bias is added to the sum."""

    def forward(self, x_TDl: Tensor, beside_TO: Tensor | None = None) -> Tensor:
        return self._with_bias(RowParallelLinear.forward(self, x_TDl, beside_TO))

    def partial(self, x_TDl: Tensor) -> Tensor:
        y_TO = RowParallelLinear.partial(self, x_TDl)
        if self.updated:
            lora_b = copy_to_region(local(self.lora_b.weight), self.region)
            y_TO = y_TO + self._update(x_TDl, local(self.lora_a.weight), lora_b)
        return y_TO


class AdaptedOutput(_Updated, ParallelOutput):
    """Rows are split over the ranks, as those of `AdaptedColumnLinear`."""

    def scores(self, x_TD: Tensor) -> Tensor:
        y_TV = ParallelOutput.scores(self, x_TD)
        if self.updated:
            lora_a = copy_to_region(local(self.lora_a.weight), self.region)
            y_TV = y_TV + self._update(x_TD, lora_a, local(self.lora_b.weight))
        return y_TV


class AdaptedRouter(_Updated, Router):
    """Whole on every rank, which sees the whole gradient."""

    def _logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = Router._logits(self, x_TD)
        if self.updated:
            logits_TE = logits_TE + self._update(x_TD, local(self.lora_a.weight), local(self.lora_b.weight))
        return logits_TE


class AdaptedExperts(Experts):
    """Stacked adapters beside the stacked experts.

    Parameters: w13_lora_a (El, 2, r, D), w13_lora_b (El, 2, F, r), w13_bias (El, 2, F); w2_lora_a (El, r, F),
    w2_lora_b (El, D, r), w2_bias (El, D). Under placement "tensor" w13_lora_a, w2_lora_b and w2_bias are whole on
    every rank. The bias of w2 stands inside the expert: the router's weight scales it.
    """

    def __init__(
        self,
        args: ModelArgs,
        state: ParallelState,
        placement: Placement,
        place: Place,
        *,
        peft: PeftArgs,
        adapters: Place,
    ) -> None:
        super().__init__(args, state, placement, place)
        experts, dim, hidden = self.w2.shape
        self.peft, self.plain = peft, False
        self.updated = (rank := peft.rank_of("routed")) > 0
        if self.updated:
            self.scale = peft.scale_of("routed")
            self.w13_lora_a = adapters.parameter(experts, 2, rank, dim)
            self.w13_lora_b = adapters.parameter(experts, 2, hidden, rank)
            self.w2_lora_a = adapters.parameter(experts, rank, hidden)
            self.w2_lora_b = adapters.parameter(experts, dim, rank)
        if peft.bias_tuning:
            self.w13_bias = adapters.parameter(experts, 2, hidden)
            self.w2_bias = adapters.parameter(experts, dim)

    def synchronises(self, x_TD: Tensor, pairs: int) -> bool:
        own = self.updated and kernels.plain_experts_synchronise(x_TD, pairs)
        return own or super().synchronises(x_TD, pairs)

    def gate_up(self, x_PD: Tensor, pairs: Pairs) -> Tensor:
        both_PO = super().gate_up(x_PD, pairs)
        if self.updated:
            lora_a = copy_to_region(local(self.w13_lora_a), self.region)
            inner_PR = pairs.product(self._dropped(x_PD), lora_a) * self.scale
            halves = zip(inner_PR.chunk(2, dim=-1), local(self.w13_lora_b).unbind(1), strict=True)
            both_PO = both_PO + torch.cat([pairs.product(inner.contiguous(), lora_b) for inner, lora_b in halves], -1)
        if self.peft.bias_tuning:
            both_PO = both_PO + pairs.bias(local(self.w13_bias).flatten(1), like=both_PO)
        return both_PO

    def down(self, hidden_PF: Tensor, pairs: Pairs) -> Tensor:
        y_PD = super().down(hidden_PF, pairs)
        if self.updated:
            inner_Pr = pairs.product(self._dropped(hidden_PF), local(self.w2_lora_a)) * self.scale
            y_PD = y_PD + pairs.product(inner_Pr, copy_to_region(local(self.w2_lora_b), self.region))
        if self.peft.bias_tuning:
            y_PD = y_PD + self.whole_bias(local(self.w2_bias), pairs, y_PD)
        return y_PD

    def _dropped(self, x_PD: Tensor) -> Tensor:
        return F.dropout(x_PD, self.peft.lora_dropout, self.training)


@torch.no_grad()
def begin_adapters(
    parameters: Mapping[str, Tensor], boxes: Mapping[str, Box], names: Iterable[str], args: ModelArgs, *, seed: int = 0
) -> None:
    """Give adapters the values of an untrained one: lora_a truncated normal (deviation 0.02), lora_b and biases 0.

    A whole tensor is the same to the bit however it is split: it is drawn from the seed and its own name, and each
    rank keeps its piece.

    Args:
        parameters: local tensors by name; filled in place.
        boxes: the part of each whole parameter that the local tensor holds.
        names: the adapters to fill.
    """
    shapes = dict(parameter_shapes(args))
    for name in names:
        if "lora_a" not in name:
            parameters[name].zero_()
            continue
        generator = torch.Generator().manual_seed((seed << 32) % 2**63 + zlib.crc32(name.encode()))
        whole = torch.empty(shapes[name])
        nn.init.trunc_normal_(whole, std=_INITIAL_STD, generator=generator)
        parameters[name].copy_(whole[boxes[name].within(Box.whole(shapes[name]))])
