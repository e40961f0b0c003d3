"""Whether so many ranks can hold a model, and with which placement of its experts.

What is split how stands in `plan`; here is only whether it divides.
"""

import math

from accessory.config import ModelArgs
from accessory.errors import unknown
from accessory.parallel.plan import PLACEMENTS, Placement, cut_widths, is_quantized, rows_of_model, sizes
from accessory.quant import format_of

# What to take where a format's groups of inputs do not fit a model.
OTHER_GROUPS = "int8 has no groups, and int4 those of 32, too"


def resolve_placement(args: ModelArgs, placement: str, size: int, *, ep_size: int = 1) -> Placement:
    """Turn "auto" into a placement, and check that ``size`` ranks can hold the model.

    Args:
        ep_size: data-parallel ranks over which the experts are spread besides.

    Raises:
        ValueError: an unknown placement, or sizes that do not divide; lists the rank counts that work.
    """
    if placement not in PLACEMENTS:
        raise ValueError(unknown("expert_placement", placement, PLACEMENTS))
    if ep_size > 1:
        _refuse_ep(args, placement, size, ep_size)
        placement = _resolved(args, placement, size, ep_size)
    obstacles = _obstacles(args, placement, size)
    if obstacles:
        works = ", ".join(map(str, supported_sizes(args, placement))) or f"none; {OTHER_GROUPS}"
        so = f"split over {size} ranks" if size > 1 else "quantized so"  # nothing else stands in the way of one
        raise ValueError(f"the model cannot be {so}: {'; '.join(obstacles)}. Rank counts that work: {works}")
    return _resolved(args, placement, size)


def _resolved(args: ModelArgs, placement: str, size: int, ep_size: int = 1) -> Placement:
    if placement == "auto":
        return "expert" if args.moe.num_experts % (size * ep_size) == 0 else "tensor"
    return "expert" if placement == "expert" else "tensor"


def _refuse_ep(args: ModelArgs, placement: str, size: int, ep_size: int) -> None:
    """Raise ValueError where so many ranks cannot share the experts, of which the model-parallel ranks have parts."""
    experts, asked = args.moe.num_experts, f"expert_parallel_size {ep_size}"
    if experts % ep_size:
        works = ", ".join(str(number) for number in range(1, experts + 1) if experts % number == 0)
        raise ValueError(f"{asked} does not divide the {experts} experts of a layer: give one of {works}")
    if experts % (ep_size * size) == 0:
        return
    shared = f"{asked} x model_parallel_size {size} does not divide the {experts} experts of a layer"
    if placement == "expert":
        raise ValueError(f'{shared} (expert_placement "expert"): give smaller sizes, or expert_placement "tensor"')
    if args.hidden_dim % size:
        raise ValueError(f"{shared}, nor model_parallel_size {size} their hidden_dim {args.hidden_dim}: give others")


def refuse_shared_heads(args: ModelArgs, size: int) -> None:
    """Raise ValueError where several of ``size`` ranks would train copies of one key/value head, which drift apart."""
    if size > args.n_kv_heads:
        raise ValueError(
            f"{size} model-parallel ranks share {args.n_kv_heads} key/value heads, whose copies would train apart: "
            f"train with model_parallel_size {args.n_kv_heads} at most"
        )


def supported_sizes(args: ModelArgs, placement: str = "auto") -> list[int]:
    """All model-parallel sizes over which a model can be split for inference."""
    return [size for size in range(1, args.n_heads + 1) if not _obstacles(args, placement, size)]


def _obstacles(args: ModelArgs, placement: str, size: int) -> list[str]:
    found = []
    counts = [("dim", args.dim), ("n_heads", args.n_heads), ("vocab_size", args.vocab_size), *cut_widths(args)]
    for label, count in counts:
        if count % size:
            found.append(f"{label} {count} is not a multiple of {size}")
    if args.n_kv_heads % size and size % args.n_kv_heads:
        found.append(f"n_kv_heads {args.n_kv_heads} and {size} do not divide one another")
    experts, hidden = args.moe.num_experts, args.hidden_dim
    if placement == "expert" and experts % size:
        found.append(f'{experts} experts are not a multiple of {size} (expert_placement "expert")')
    if placement == "tensor" and hidden % size:
        found.append(f'hidden_dim {hidden} is not a multiple of {size} (expert_placement "tensor")')
    if placement == "auto" and experts % size and hidden % size:
        found.append(f"neither {experts} experts nor hidden_dim {hidden} are a multiple of {size}")
    if not found and args.quant is not None:
        found += cut_groups(args, _resolved(args, placement, size), size)
    return found


def cut_groups(args: ModelArgs, placement: Placement, size: int) -> list[str]:
    """Why ``size`` ranks (or files) cannot hold whole groups of a quantized model's inputs; empty if they can."""
    assert args.quant is not None
    counts, found = sizes(args), []
    group = format_of(args.quant.type, args.quant.group_size).group
    for row in rows_of_model(args):
        if not is_quantized(row, args.quant):
            continue
        inputs = math.prod(counts[factor] for factor in row.shape[-1].split("*"))
        own = inputs // size if row.axis(placement) == len(row.shape) - 1 else inputs
        if own % group:
            name = row.pattern.replace("layers.N.", "")
            found.append(f"{own} inputs of {name} on a rank are not whole groups of {group} ({args.quant.type})")
    return found
