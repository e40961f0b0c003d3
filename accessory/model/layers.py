"""Which classes a block's layers with matrices are built of."""

from collections.abc import Callable
from typing import NamedTuple

from accessory.config import ModelArgs
from accessory.model.moe import Experts
from accessory.parallel.layers import ColumnParallelLinear, RowParallelLinear
from accessory.parallel.plan import Placement
from accessory.parallel.state import ParallelState, Place


class Layers(NamedTuple):
    """The plain ones, or those of `lora.adapted_layers`; called as the plain classes are.

    Attributes:
        column, row: of attention.
        unit_column, unit_row: of a `GatedUnit`.
    """

    column: Callable[[int, int, Place], ColumnParallelLinear] = ColumnParallelLinear
    row: Callable[[int, int, ParallelState, Place], RowParallelLinear] = RowParallelLinear
    experts: Callable[[ModelArgs, ParallelState, Placement, Place], Experts] = Experts
    unit_column: Callable[[int, int, Place], ColumnParallelLinear] = ColumnParallelLinear
    unit_row: Callable[[int, int, ParallelState, Place], RowParallelLinear] = RowParallelLinear


PLAIN = Layers()
