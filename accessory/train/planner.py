"""Layouts of a training run that so many devices allow, what each takes and sends, and how long a step may take.

Nothing here knows a layer: memory is `train.memory`'s, arithmetic `train.flops`', sizes the plan's. The time is an
estimate from rates that are given, for comparing layouts with one another.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from accessory.config import ModelArgs
from accessory.parallel.placement import refuse_shared_heads, resolve_placement
from accessory.train.flops import flops_per_token, recomputed_per_token
from accessory.train.memory import Held, Layout, Memory, held, optimizer_refusal, state_bytes, training_memory
from accessory.train.options import DataParallel, RecomputePolicy

# Of a layer in a step: how often rows of tokens travel to experts or back, and how often the model-parallel ranks sum
# activations. What is computed again does not end with a sum, which nothing behind it asks for.
EXCHANGES: dict[RecomputePolicy, int] = {"none": 4, "moe": 6, "full": 6}
SUMS: dict[RecomputePolicy, int] = {"none": 4, "moe": 4, "full": 5}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a step's time is estimated from.

    Attributes:
        flops: floating-point operations a second that a device reaches in products.
        fast, slow: bytes a second that a device sends to others of its host, and to other hosts.
        per_host: devices of a host.
    """

    flops: float = 400e12
    fast: float = 300e9
    slow: float = 40e9
    per_host: int = 8


class Planned(NamedTuple):
    """One layout.

    Attributes:
        fast, slow: bytes that a rank sends in a step within its host, and to others.
        seconds: of a step, where nothing that is sent is hidden behind products.
        tokens: of all ranks in a step.
    """

    layout: Layout
    memory: Memory
    fast: float
    slow: float
    seconds: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def layouts(
    args: ModelArgs, devices: int, common: Layout, *, per_host: int = 8, fixed: Mapping[str, Any] | None = None
) -> Iterator[Layout]:
    """All that the sizes allow, with mp and ep x mp within a host.

    Args:
        fixed: values that some attributes of a Layout are to have.
    """
    fixed = fixed or {}
    for mp_size in _divisors(devices):
        dp_size = devices // mp_size
        for ep_size in _divisors(dp_size):
            if mp_size * ep_size > max(1, per_host) or fixed.get("mp_size", mp_size) != mp_size:
                continue
            for placement in ("expert", "tensor"):
                if placement == "tensor" and mp_size == 1:
                    continue
                try:
                    refuse_shared_heads(args, mp_size)
                    found = resolve_placement(args, placement, mp_size, ep_size=ep_size)
                except ValueError:
                    continue
                for data_parallel in get_args(DataParallel) if dp_size > 1 else ("sdp",):
                    layout = dataclasses.replace(
                        common,
                        dp_size=dp_size,
                        mp_size=mp_size,
                        ep_size=ep_size,
                        placement=found,
                        data_parallel=data_parallel,
                    )
                    every = [dataclasses.replace(layout, policy=policy) for policy in get_args(RecomputePolicy)]
                    allowed = [own for own in every if all(getattr(own, name) == fixed[name] for name in fixed)]
                    if allowed and not optimizer_refusal(args, layout):
                        yield from allowed


def plan(args: ModelArgs, devices: int, limit: float, common: Layout, rates: Rates) -> list[Planned]:
    """The layouts that fit a device of ``limit`` bytes, the fastest first.

    Raises:
        ValueError: none does; names what the one that needs the least would take.
    """
    allowed = list(layouts(args, devices, common, per_host=rates.per_host))
    if not allowed:
        raise ValueError(f"{devices} devices cannot share this model: no sizes divide; give another number of them")
    planned = fastest(args, allowed, limit, rates)
    if not planned:
        least, layout = smallest(args, allowed, limit)
        raise ValueError(
            f"no layout fits {limit / 2**30:.2f} GiB: the smallest ({described(layout)}) takes "
            f"{least / 2**30:.2f} GiB a device; give more devices, adapters (--task lora), or fewer --max_words"
        )
    return planned


def fastest(args: ModelArgs, allowed: Iterable[Layout], limit: float, rates: Rates) -> list[Planned]:
    """Those of some layouts that fit a device of ``limit`` bytes, the fastest first."""
    fits = [layout for layout in allowed if state_bytes(args, layout).total <= limit]
    found = [(training_memory(args, layout), layout) for layout in fits]
    planned = [_planned(args, layout, memory, rates) for memory, layout in found if memory.total <= limit]
    return sorted(planned, key=lambda own: (-own.tokens_per_s, own.memory.total))


def smallest(args: ModelArgs, allowed: Iterable[Layout], limit: float) -> tuple[int, Layout]:
    """Where none fits, the layout that takes the least, and how much; of those whose state is beyond it, its state."""
    states = [(state_bytes(args, layout).total, layout) for layout in allowed]
    found = [(training_memory(args, layout).total, layout) for size, layout in states if size <= limit]
    return min(found or states, key=lambda own: own[0])


def described(layout: Layout) -> str:
    placed = f" {layout.placement}" if layout.mp_size > 1 else ""
    return (
        f"dp {layout.dp_size} {layout.data_parallel}, mp {layout.mp_size}{placed}, ep {layout.ep_size}, {layout.policy}"
    )


def options_of(layout: Layout) -> dict[str, Any]:
    """What main_finetune.py is told."""
    return {
        "model_parallel_size": layout.mp_size,
        "expert_parallel_size": layout.ep_size,
        "expert_placement": layout.placement,
        "data_parallel": layout.data_parallel,
        "grad_ckpt_policy": layout.policy,
        "precision": layout.precision,
        "batch_size": layout.rows,
        "accum_iter": layout.accum,
        "max_words": layout.length,
    }


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _planned(args: ModelArgs, layout: Layout, memory: Memory, rates: Rates) -> Planned:
    own_tokens = layout.rows * layout.length * layout.accum
    tokens = own_tokens * layout.dp_size
    fast, slow = _sent(args, layout, rates.per_host)
    each = flops_per_token(args, layout.length) + recomputed_per_token(args, layout.length, layout.policy)
    work = each * own_tokens / layout.mp_size
    return Planned(layout, memory, fast, slow, work / rates.flops + fast / rates.fast + slow / rates.slow, tokens)


def _sent(args: ModelArgs, layout: Layout, per_host: int) -> tuple[float, float]:
    """Bytes that a rank sends in a step, within its host and to others."""
    sums = {True: 0.0, False: 0.0}

    def add(size: float, ranks: int, stride: int) -> None:
        """To ranks that are so far from one another; of their number the share that this one has is not sent."""
        sums[ranks * stride <= per_host] += size * (ranks - 1) / ranks

    tokens = layout.rows * layout.length * layout.accum
    row = args.dim * layout.dtype.itemsize
    add(2 * SUMS[layout.policy] * tokens * row * args.n_layers, layout.mp_size, 1)  # a reduction and a gathering each
    pairs = args.moe.num_experts_per_tok / (layout.mp_size if layout.placement == "expert" else 1)
    add(EXCHANGES[layout.policy] * tokens * pairs * row * len(args.moe_layers), layout.ep_size, layout.mp_size)
    for own in held(args, layout):
        if own.unit is None:
            continue
        stride = layout.mp_size * layout.dp_size // own.unit.ranks
        add(_of_unit(own, layout), own.unit.ranks, stride)
    return sums[True], sums[False]


def _of_unit(own: Held, layout: Layout) -> float:
    """Bytes of a parameter that pass between the ranks of its unit in a step: copies that are gathered, gradients."""
    gradient = own.gathered * 4 if own.trains else 0
    if layout.data_parallel == "ddp":
        return 2 * gradient  # a reduction and a gathering, in the last backward pass
    gatherings = 2 if layout.data_parallel == "fsdp" and own.unit is not None and own.unit.module else 1
    return layout.accum * (gatherings * own.gathered * own.gathered_itemsize + gradient)
