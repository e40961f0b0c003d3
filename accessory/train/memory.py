"""Memory of the fullest rank in training, by part, before anything is built.

Sizes of a rank's parameters are those of the plan's rows, cut along the first axis as `train.sharding` cuts them; what
layers keep and need is traced on the layers themselves (`train.trace`). What FSDP does around them (which copies it
gathers and when it lets go of them) is followed through a step here, moment by moment.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from accessory.config import ModelArgs
from accessory.parallel.plan import (
    Placement,
    dtype_of,
    layer_of,
    local_box,
    parameter_shapes,
    share_of_tokens,
    split_of,
    trains,
)
from accessory.train.muon import Cut
from accessory.train.optim import OPTIMIZERS, kept_bytes, step_bytes
from accessory.train.options import DataParallel, OptimizerName, Precision, RecomputePolicy
from accessory.train.precision import COMPUTE_DTYPES
from accessory.train.sharding import Unit, sharded_axis, unit_of
from accessory.train.trace import Pass, trace_head, trace_layers

_FLOAT = 4  # bytes of float32, in which everything trains and gradients are summed
_MADE = 8  # numbers that are there for each that a matrix makes, at the very most


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a training run is spread, and what a rank does in a micro-batch.

    Attributes:
        rows, length: of a micro-batch of one rank.
        accum: micro-batches of a step.
        gpu: the ranks are GPUs, and not processes on CPUs.
    """

    dp_size: int = 1
    mp_size: int = 1
    ep_size: int = 1
    placement: Placement = "expert"
    data_parallel: DataParallel = "sdp"
    policy: RecomputePolicy = "none"
    precision: Precision = "bf16"
    optimizer: OptimizerName = "adamw"
    rows: int = 4
    length: int = 1024
    accum: int = 1
    gpu: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return COMPUTE_DTYPES[self.precision]


class Memory(NamedTuple):
    """Bytes at the fullest moment of a rank; together they are what it then has.

    Attributes:
        weights, gradients, optimizer: what the rank keeps of them.
        activations: of the passes, and what their operations need besides; or what the optimizer's step needs.
        exchange: whole copies of sharded parameters and of their gradients, and the buffers of these.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0
    exchange: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class Held(NamedTuple):
    """What the first rank holds of a parameter.

    Attributes:
        shape: of the whole.
        own: of its shard.
        cuts: how it lies along each axis of its mesh.
        gathered: elements of its part along ep and mp, which a unit gathers.
        itemsize, gathered_itemsize: bytes of an element of the one and the other.
        trains: whether it has a gradient.
        unit: None: FSDP has no part in it.
        across: the unit's pieces do not lie one behind another, and are copied together.
    """

    name: str
    shape: tuple[int, ...]
    own: tuple[int, ...]
    cuts: tuple[Cut, ...]
    gathered: int
    itemsize: int
    gathered_itemsize: int
    trains: bool
    unit: Unit | None
    across: bool

    @property
    def numel(self) -> int:
        return math.prod(self.own)


def held(args: ModelArgs, layout: Layout, *, rank: int = 0) -> tuple[Held, ...]:
    """Every parameter of a training model on a rank; the first one holds no less of any than another."""
    # What a rank does in a step changes nothing of it: many layouts that are compared have the same.
    return _held(args, dataclasses.replace(layout, policy="none", optimizer="adamw", rows=1, length=1, accum=1), rank)


@functools.lru_cache(maxsize=64)
def _held(args: ModelArgs, layout: Layout, rank: int) -> tuple[Held, ...]:
    return tuple(_parameters(args, layout, rank))


def _parameters(args: ModelArgs, layout: Layout, rank: int) -> Iterator[Held]:
    dtype = layout.dtype
    dp_rank, mp_rank = divmod(rank, layout.mp_size)
    efsdp_rank, ep_rank = divmod(dp_rank, layout.ep_size)
    for name, shape in parameter_shapes(args):
        box = local_box(
            name,
            shape,
            args,
            placement=layout.placement,
            rank=mp_rank,
            size=layout.mp_size,
            ep_rank=ep_rank,
            ep_size=layout.ep_size,
        )
        own, unit, axis = trains(name, args), unit_of(name, layout.dp_size, layout.ep_size), 0
        frozen = dtype_of(name, dtype)
        shard = box
        ranks = {"ep": layout.ep_size, "mp": layout.mp_size}
        cuts: tuple[Cut, ...] = tuple(
            (ranks[cut.mesh], cut.axis) for cut in split_of(name).cuts[layout.placement] if ranks[cut.mesh] > 1
        )
        if unit is not None and layout.data_parallel != "ddp":
            axis = sharded_axis(
                shape,
                [taken for _, taken in cuts if taken is not None],
                unit.ranks,
                packed=not frozen.is_floating_point,
            )
            shard = box.chunk(axis, rank=efsdp_rank if unit.spread else dp_rank, size=unit.ranks)
            cuts = ((unit.ranks, axis), *cuts)
        itemsize = _FLOAT if own else frozen.itemsize
        gathered_itemsize = dtype.itemsize if own else frozen.itemsize
        yield Held(name, shape, shard.size, cuts, box.numel, itemsize, gathered_itemsize, own, unit, axis > 0)


def state_bytes(args: ModelArgs, layout: Layout, *, rank: int = 0) -> Memory:
    """Weights, gradients and optimizer of a rank alone, without which no run can do."""
    weights = gradients = 0
    optimizer = 0.0
    for own in held(args, layout, rank=rank):
        weights += own.numel * own.itemsize
        if own.trains:
            gradients += own.numel * _FLOAT
            optimizer += own.numel * kept_bytes(layout.optimizer, own.name, own.shape)
    return Memory(weights, gradients, int(optimizer))


def optimizer_refusal(args: ModelArgs, layout: Layout) -> str:
    """What the optimizer says to the parameters that it cannot step as ranks hold them; empty where it can step all."""
    refuses = OPTIMIZERS[layout.optimizer].refuses
    if refuses is None:
        return ""
    return next((said for own in held(args, layout) if own.trains and (said := refuses(own.shape, own.own))), "")


def most_bytes(args: ModelArgs, layout: Layout) -> int:
    """More than the fullest rank can take, found at once: where so much is there, nobody needs to know any better.

    All that matrices make of a token, so often that it is more than layers keep and need, and all parameters gathered.
    """
    made = sum(
        math.prod(shape[:-1]) * share_of_tokens(split_of(name), args)
        for name, shape in parameter_shapes(args.replace(quant=None))
        if len(shape) > 1 and split_of(name).kind != "embedding"
    )
    copies = sum(own.gathered * (3 * own.gathered_itemsize + _FLOAT) for own in held(args, layout))
    tokens = layout.rows * layout.length
    return state_bytes(args, layout).total + copies + int(_MADE * _FLOAT * made * tokens)


@dataclass
class _Units:
    """Of a layer, or of what is around the layers: sums over its units.

    Attributes:
        whole: bytes that they gather.
        flat: of the largest one, as it arrives; 0 where each rank has its parameters whole.
        across: bytes of the largest one that are copied once more.
        whole_gradients: bytes of the gathered parameters' gradients.
        reduced: of the largest one the gradients in float32, which are summed.
        shards: gradients that stay.
    """

    whole: int = 0
    flat: int = 0
    across: int = 0
    whole_gradients: int = 0
    reduced: int = 0
    shards: int = 0


def _units(args: ModelArgs, layout: Layout) -> dict[int | None, _Units]:
    """By layer; None: around the layers."""
    found: dict[int | None, dict[str, _Units]] = {None: {}, **{layer: {} for layer in range(args.n_layers)}}
    sharded = layout.data_parallel != "ddp"
    for own in held(args, layout):
        layer = layer_of(own.name) if own.name.startswith("layers.") else None
        unit = found[layer].setdefault("" if own.unit is None else own.unit.module or "model", _Units())
        unit.shards += own.numel * _FLOAT if own.trains else 0
        if own.unit is None:
            continue
        size = own.gathered * own.gathered_itemsize
        unit.whole += size
        unit.flat += size if sharded else 0
        unit.across += size if own.across else 0
        if own.trains:
            unit.whole_gradients += size
            unit.reduced += own.gathered * _FLOAT
    return {layer: _together(list(units.values())) for layer, units in found.items()}


def _together(units: list[_Units]) -> _Units:
    return _Units(
        whole=sum(unit.whole for unit in units),
        flat=max((unit.flat for unit in units), default=0),
        across=max((unit.across for unit in units), default=0),
        whole_gradients=sum(unit.whole_gradients for unit in units),
        reduced=max((unit.reduced for unit in units), default=0),
        shards=sum(unit.shards for unit in units),
    )


class _Moment(NamedTuple):
    """Bytes that are there at once beside weights and optimizer."""

    gradients: int
    activations: int
    exchange: int


def training_memory(args: ModelArgs, layout: Layout) -> Memory:
    """Of the fullest rank at its fullest moment, with even experts, from the second step on."""
    state = state_bytes(args, layout)
    fullest = max(_moments(args, layout, state.gradients), key=sum)
    return Memory(state.weights, fullest.gradients, state.optimizer, fullest.activations, fullest.exchange)


def _step_bytes(args: ModelArgs, layout: Layout) -> int:
    """The most that the optimizer's step needs besides: it takes one parameter after another."""
    steps = (
        step_bytes(layout.optimizer, own.name, own.shape, own.own, own.cuts, gpu=layout.gpu)
        for own in held(args, layout)
        if own.trains
    )
    return max(steps, default=0)


def _moments(args: ModelArgs, layout: Layout, all_gradients: int) -> Iterator[_Moment]:
    units = _units(args, layout)
    around = units[None]
    layers = [units[layer] for layer in range(args.n_layers)]
    alone = unit_of("layers.0.feed_forward.experts.w13", layout.dp_size, layout.ep_size) is None
    weight_dtype = torch.float32 if layout.dp_size == 1 else layout.dtype
    tokens = layout.rows * layout.length
    traced = trace_layers(
        Pass(
            args=args,
            mp_size=layout.mp_size,
            ep_size=layout.ep_size,
            placement=layout.placement,
            policy=layout.policy,
            dtype=layout.dtype,
            weight_dtype=weight_dtype,
            expert_dtype=torch.float32 if alone else layout.dtype,
            rows=layout.rows,
            length=layout.length,
            gpu=layout.gpu,
        )
    )
    head = trace_head(args, dtype=layout.dtype, weight_dtype=weight_dtype, tokens=tokens, gpu=layout.gpu)
    before = all_gradients if layout.accum > 1 else 0
    kept = tokens * args.dim * layout.dtype.itemsize  # the embedded tokens
    keeps = layout.data_parallel != "fsdp"
    gathered, last = around.whole, around.flat
    for own, units_of_layer in zip(traced, layers, strict=True):
        now = gathered + units_of_layer.whole + units_of_layer.flat
        yield _Moment(before, kept, now + max(last, units_of_layer.across))
        yield _Moment(before, kept + own.forward, now)
        kept += own.kept
        gathered += units_of_layer.whole if keeps else 0
        last = units_of_layer.flat
    yield _Moment(before, kept + head.forward, gathered + last)
    kept += head.kept
    yield _Moment(before, kept + head.backward, gathered)
    kept -= head.kept
    # Gradients of what is around the layers wait for the last, the embedding's, as large as the head's.
    waiting, done, reduced = around.whole_gradients // 2, before, 0
    for number in reversed(range(args.n_layers)):
        own, units_of_layer = traced[number], layers[number]
        ahead = 0 if keeps or number == 0 else layers[number - 1].flat
        here = 0 if keeps else units_of_layer.whole
        yield _Moment(done, kept + own.backward, gathered + here + ahead + waiting + reduced)
        kept -= own.kept
        gathered -= units_of_layer.whole if keeps else 0
        done, reduced = min(all_gradients, done + units_of_layer.shards), units_of_layer.reduced
        yield _Moment(done, kept, gathered + ahead + waiting + units_of_layer.whole_gradients + reduced)
    yield _Moment(all_gradients, kept, around.whole_gradients + around.reduced)
    yield _Moment(all_gradients, _step_bytes(args, layout), 0)
