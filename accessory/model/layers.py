"""Which classes a model's layers with matrices are built of."""

from collections.abc import Callable
from typing import NamedTuple

from accessory.config import ModelArgs
from accessory.model.moe import Experts
from accessory.model.router import Router
from accessory.parallel.layers import Linears, ParallelOutput
from accessory.parallel.plan import Placement
from accessory.parallel.state import ParallelState, Place


class Layers(NamedTuple):
    """The plain ones, or those of `lora.adapted_layers`; called as the plain classes are.

    Attributes:
        shared: of the expert that all tokens visit.
        dense: of a feed-forward part without experts.
    """

    attention: Linears = Linears()
    router: Callable[[ModelArgs, Place], Router] = Router
    experts: Callable[[ModelArgs, ParallelState, Placement, Place], Experts] = Experts
    shared: Linears = Linears()
    dense: Linears = Linears()
    output: Callable[..., ParallelOutput] = ParallelOutput


PLAIN = Layers()
