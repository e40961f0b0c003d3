"""Products of pairs of a token and its expert with the stacked matrices of the experts, in one of three ways.

Whatever the experts' layer is made of, plain or with adapters, asks a `Way` for each product, and so runs in all.

Shape letters: P pairs, E experts (this rank's), D depth of a product, O outputs.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.expert_products import differentiable_product
from accessory.quant import QuantizedWeight, gathered_linear, grouped_linear


class Way(Protocol):
    """How the pairs of one layer find their experts' weights."""

    def product(self, x_PD: Tensor, weight_EOD: Tensor | QuantizedWeight) -> Tensor:
        """Each pair's row times its expert's matrix transposed; (P, O). Several axes of outputs count as one."""
        ...

    def rows(self, bias_EO: Tensor, like: Tensor) -> Tensor:
        """Each pair's expert's row, zeros where the expert is on another rank; (P, O) in the dtype of ``like``."""
        ...


class GatheredPairs:
    """Few pairs in inference: only the chosen experts' rows are read, and shapes do not depend on the choice.

    Args:
        experts_P: number of each pair's expert, -1 where it is not this rank's.
    """

    def __init__(self, experts_P: Tensor) -> None:
        self.experts_P = experts_P

    def product(self, x_PD: Tensor, weight_EOD: Tensor | QuantizedWeight) -> Tensor:
        return gathered_linear(x_PD, weight_EOD, self.experts_P)

    def rows(self, bias_EO: Tensor, like: Tensor) -> Tensor:
        rows_PO = bias_EO[self.experts_P.clamp(min=0)].type_as(like)
        return rows_PO.masked_fill((self.experts_P < 0)[:, None], 0)


class GroupedPairs:
    """Many pairs in inference, sorted by expert.

    Args:
        ends_E: int32, where each expert's pairs end; those behind the last one belong to nobody here, and what a
            product says of them is meaningless.
    """

    def __init__(self, ends_E: Tensor) -> None:
        self.ends_E = ends_E

    def product(self, x_PD: Tensor, weight_EOD: Tensor | QuantizedWeight) -> Tensor:
        return grouped_linear(x_PD, weight_EOD, self.ends_E)

    def rows(self, bias_EO: Tensor, like: Tensor) -> Tensor:
        # As a product, whose gradient is a sum in float32 and always in the same order.
        place_P1 = torch.arange(like.shape[0], device=like.device)[:, None]
        begins_E = F.pad(self.ends_E[:-1], (1, 0))
        own_PE = (place_P1 >= begins_E) & (place_P1 < self.ends_E)
        return own_PE.type_as(like) @ bias_EO.type_as(like)


class TrainedPairs(GroupedPairs):
    """Sorted pairs, all of them this rank's, with gradients."""

    def product(self, x_PD: Tensor, weight_EOD: Tensor | QuantizedWeight) -> Tensor:
        if isinstance(weight_EOD, QuantizedWeight):
            return grouped_linear(x_PD, weight_EOD, self.ends_E)
        return differentiable_product(x_PD, weight_EOD.flatten(1, -2), self.ends_E)
