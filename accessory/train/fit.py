"""Whether a run fits the memory of its devices, asked before any of it is taken.

What cannot fit is refused: weights, gradients and optimizer, without which no run can do. Of all else there is an
estimate, which warns.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from functools import partial

import torch

from accessory.config import ModelArgs, PeftArgs, QuantArgs
from accessory.errors import shown_bytes
from accessory.launch.memory import DeviceMemory, device_memory
from accessory.parallel.placement import resolve_placement
from accessory.parallel.state import ParallelState, Ranks, agreed, on_first
from accessory.train.memory import Layout, most_bytes, optimizer_refusal, state_bytes, training_memory
from accessory.train.optim import OPTIMIZERS
from accessory.train.options import FinetuneOptions
from accessory.train.planner import Rates, fastest, layouts, options_of, smallest

logger = logging.getLogger(__name__)

_LORA = "--lora_rank 8"


def layout_of(options: FinetuneOptions, args: ModelArgs, *, ranks: int, ep_size: int, gpu: bool) -> Layout:
    """How a run with these options is spread over so many ranks."""
    mp_size = options.model_parallel_size
    return Layout(
        dp_size=ranks // mp_size,
        mp_size=mp_size,
        ep_size=ep_size,
        placement=resolve_placement(args, options.expert_placement, mp_size, ep_size=ep_size),
        data_parallel=options.data_parallel,
        policy=options.grad_ckpt_policy,
        precision=options.precision,
        optimizer=options.optimizer,
        rows=options.batch_size,
        length=options.max_words,
        accum=options.accum_iter,
        gpu=gpu,
    )


def chosen_ep_size(
    options: FinetuneOptions, args: ModelArgs, device: torch.device, *, ranks: int, per_host: int
) -> int:
    """What --expert_parallel_size auto stands for: of the layouts that the other options allow, the fastest that fits.

    Where none does it is the one that takes the least.

    Args:
        device: this rank's, which others of its host may share.
        ranks, per_host: of the run, and of this host.
    """
    gpu = device.type == "cuda"
    alone = layout_of(options, args, ranks=ranks, ep_size=1, gpu=gpu)
    names = ("mp_size", "policy", *(("data_parallel",) if alone.dp_size > 1 else ()))
    fixed = {name: getattr(alone, name) for name in names}
    found = layouts(args, ranks, alone, per_host=per_host, fixed=fixed)
    allowed = [own for own in found if _asked_for(own, options.expert_placement, args)] or [alone]
    limit = device_memory(device).bytes // -(-per_host // (torch.cuda.device_count() if gpu else 1))
    fits = fastest(args, allowed, limit, Rates(per_host=per_host))
    chosen = fits[0].layout if fits else smallest(args, allowed, limit)[1]
    sizes = ", ".join(str(size) for size in sorted({own.ep_size for own in allowed}))
    logger.info("--expert_parallel_size auto: %d (of %s), as accessory plan would choose", chosen.ep_size, sizes)
    return chosen.ep_size


def _asked_for(layout: Layout, placement: str, args: ModelArgs) -> bool:
    """Whether a run with this --expert_placement would place experts so."""
    if layout.mp_size == 1:
        return True
    if placement == "auto":
        placement = resolve_placement(args, placement, layout.mp_size, ep_size=layout.ep_size)
    return layout.placement == placement


def ask_memory(options: FinetuneOptions, args: ModelArgs, state: ParallelState, world: Ranks, *, per_host: int) -> None:
    """Refuse a run that cannot fit, or not step, and warn of one that may not fit; collective over all ranks.

    Args:
        world: all ranks of the run.
        per_host: ranks of this host.

    Raises:
        ValueError: on every rank alike; says what would fit, or what the optimizer cannot step.
    """
    layout = layout_of(options, args, ranks=world.size, ep_size=state.ep.size, gpu=state.device.type == "cuda")
    if said := optimizer_refusal(args, layout):  # the same on every rank
        raise ValueError(said)
    memory = agreed(world, lambda: device_memory(state.device))
    sharing: dict[DeviceMemory, list[int]] = {}
    for theirs, own in world.gathered((memory, state_bytes(args, layout, rank=world.rank).total)):
        sharing.setdefault(theirs, []).append(own)
    fullest = max(sharing, key=lambda device: sum(sharing[device]) / device.bytes)
    on_first(world, partial(_ask, args, layout, fullest, sharing[fullest], per_host))


def _ask(args: ModelArgs, layout: Layout, device: DeviceMemory, own: list[int], per_host: int) -> None:
    """Of the fullest device, and what the ranks have there."""
    each, has = device.bytes // len(own), f"{device.name} has {shown_bytes(device.bytes)}"
    of = f"of {len(own)} ranks " if len(own) > 1 else ""
    if sum(own) > device.bytes:
        ways = ", or ".join(_ways(args, layout, each, per_host)) or "a smaller model, or more ranks"
        raise ValueError(
            f"the run cannot fit: weights, gradients and optimizer {of}take {shown_bytes(sum(own))}, and {has}; what "
            f"would: {ways}"
        )
    if most_bytes(args, layout) <= each:
        return
    estimate = training_memory(args, layout)
    if estimate.total > each:
        parts = ", ".join(f"{name} {shown_bytes(len(own) * size)}" for name, size in estimate._asdict().items() if size)
        logger.warning(
            "a step %smay take %s with rows of --max_words %d tokens (%s; estimated), and %s: %s",
            *(of, shown_bytes(len(own) * estimate.total), layout.length, parts, has, _help(args, layout, each)),
        )


def _ways(args: ModelArgs, layout: Layout, limit: int, per_host: int) -> Iterator[str]:
    """What would fit ranks that have so much each: on as many, trained otherwise, and on more."""
    ranks, same = layout.dp_size * layout.mp_size, None
    least = min(OPTIMIZERS, key=lambda name: state_bytes(args, dataclasses.replace(layout, optimizer=name)).total)
    for optimizer in dict.fromkeys((layout.optimizer, least)):
        other = dataclasses.replace(layout, optimizer=optimizer)
        same = same or next(_fitting(args, other, ranks, limit, per_host), None)
    if same is not None:
        yield _described(args, layout, same)
    for flags, other_args in _adapted(args):
        if way := next(_fitting(other_args, layout, ranks, limit, per_host), None):
            yield _described(other_args, layout, way, flags)
            break
    whole = state_bytes(args, dataclasses.replace(layout, dp_size=1, mp_size=1, ep_size=1)).total
    enough = ranks * 2 ** math.ceil(math.log2(max(2, whole / limit / ranks)))
    for more in (enough, 2 * enough) if same is None else ():
        if way := next(_fitting(args, layout, more, limit, per_host), None):
            yield _described(args, layout, way, f"{more} ranks that have {shown_bytes(limit)} each")
            break


def _adapted(args: ModelArgs) -> Iterator[tuple[str, ModelArgs]]:
    """Flags with which less trains, or in fewer bits, and the model that they make."""
    quantized = QuantArgs(type="nf4")
    if args.peft is None:
        adapted = args.replace(peft=PeftArgs(lora_rank=8, bias_tuning=False))
        yield _LORA, adapted
        yield f"{_LORA} --quant nf4", adapted.replace(quant=quantized)
    elif args.quant is None:
        yield "--quant nf4", args.replace(quant=quantized)


def _fitting(args: ModelArgs, layout: Layout, ranks: int, limit: int, per_host: int) -> Iterator[Layout]:
    """Layouts of so many ranks whose state fits, those first of which fewer options are others."""
    found = layouts(args, ranks, layout, per_host=per_host, fixed={"policy": layout.policy})
    for own in sorted(found, key=lambda own: len(_changes(layout, own))):
        if state_bytes(args, own).total <= limit:
            yield own


def _changes(before: Layout, after: Layout) -> dict[str, object]:
    told = options_of(before)
    changes = {name: value for name, value in options_of(after).items() if value != told[name]}
    if after.mp_size == 1:  # there is no choice
        changes.pop("expert_placement", None)
    return changes


def _described(args: ModelArgs, before: Layout, after: Layout, *beside: str) -> str:
    flags = [f"--{name} {value}" for name, value in _changes(before, after).items()]
    if after.optimizer != before.optimizer:
        flags.append(f"--optimizer {after.optimizer}")
    return f"{' '.join([*beside, *flags])} ({shown_bytes(state_bytes(args, after).total)} a rank)"


def _help(args: ModelArgs, layout: Layout, limit: int) -> str:
    """What would bring the estimate of a rank below a limit, the least change first."""
    sharded = dataclasses.replace(layout, data_parallel="fsdp") if layout.dp_size > 1 else layout
    fewer = dataclasses.replace(sharded, rows=1, accum=layout.accum * layout.rows)
    for base in (layout, sharded, fewer):
        for own in (base, dataclasses.replace(base, policy="moe"), dataclasses.replace(base, policy="full")):
            if own != layout and (total := training_memory(args, own).total) <= limit:
                flags = " ".join(f"--{name} {value}" for name, value in _changes(layout, own).items())
                return f"{flags} may take {shown_bytes(total)} a rank"
    return f"more ranks, a smaller --max_words, or adapters ({_LORA}) take less"
