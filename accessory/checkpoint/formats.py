"""Names and shapes of each checkpoint form: which tensor of which file fills which part of which parameter.

A form is a list of `Source`s. The reader copies the part that a rank needs; the converter writes a form by
walking the same list in the other direction. Byte-for-byte descriptions stand in docs/checkpoints.md.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from accessory.config import ModelArgs
from accessory.parallel.box import Box
from accessory.parallel.placement import cut_groups
from accessory.parallel.plan import local_box, matrix_of, parameter_shapes

PREFIX = "llma."


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint file and the part of a parameter that it holds.

    Attributes:
        parameter: name in the Transformer.
        file: number of the shard.
        key: name in the file, without the prefix.
        shape: shape in the file.
        box: the part of the whole parameter that the tensor holds.
        view: turns the file's tensor into a view of the box's shape.
    """

    parameter: str
    file: int
    key: str
    shape: tuple[int, ...]
    box: Box
    view: Callable[[Tensor], Tensor]


def base_sources(args: ModelArgs, files: int) -> Iterator[Source]:
    """The form that the reference page calls converted; one file is the layout of the torrent release.

    Matrices are cut as the plan cuts them over ``files`` ranks, experts lie whole in one file each.
    """
    for name, shape in parameter_shapes(args):
        for file in range(files):
            box = local_box(name, shape, args, placement="expert", rank=file, size=files)
            if ".experts." in name:
                yield from _single_experts(name, file, box)
            else:
                yield Source(name, file, name, box.size, box, _as_is)


def sparse_sources(args: ModelArgs, files: int) -> Iterator[Source]:
    """Every file holds a slice of the hidden dimension of every expert; w2 lies transposed.

    The experts' adapters have the names of the base form, cut as placement "tensor" cuts them.
    """
    experts, hidden, dim = args.moe.num_experts, args.hidden_dim // files, args.dim
    stacked = (experts * hidden, dim)
    for name, shape in parameter_shapes(args):
        for file in range(files):
            if not name.endswith((".experts.w13", ".experts.w2")):
                box = local_box(name, shape, args, placement="tensor", rank=file, size=files)
                if ".experts." in name:
                    yield from _single_experts(name, file, box)
                else:
                    yield Source(name, file, name, box.size, box, _as_is)
                continue
            moe = name[: name.index(".experts.")]
            if name.endswith(".w2"):
                box = Box((0, 0, file * hidden), (experts, dim, hidden))
                yield Source(name, file, f"{moe}.w2", stacked, box, _stacked_w2(experts))
                continue
            for half, matrix in enumerate(("w1", "w3")):
                box = Box((0, half, file * hidden, 0), (experts, 1, hidden, dim))
                yield Source(name, file, f"{moe}.{matrix}", stacked, box, _stacked_w13(experts))


def sources(args: ModelArgs, files: int, *, sparse: bool) -> Iterator[Source]:
    """The sources of an accessory or consolidated checkpoint of ``files`` shards."""
    return sparse_sources(args, files) if sparse else base_sources(args, files)


def obstacles_to_files(args: ModelArgs, files: int, *, sparse: bool) -> list[str]:
    """Why ``files`` shards cannot hold this model; empty where they can."""
    counts = [("dim", args.dim), ("n_heads", args.n_heads), ("n_kv_heads", args.n_kv_heads)]
    counts += [("vocab_size", args.vocab_size)] if args.vocab_size != -1 else []
    counts += [("hidden_dim", args.hidden_dim)] if sparse else [("moe.num_experts", args.moe.num_experts)]
    found = [f"{label} {count} is not a multiple of {files}" for label, count in counts if count % files]
    if not found and args.quant is not None:
        found += cut_groups(args, "tensor" if sparse else "expert", files)
    return found


def is_sparse(keys: Iterable[str], *, file: int, files: int, args: ModelArgs) -> bool:
    """Whether the keys of shard ``file`` are those of the sparse form.

    A folder with adapters alone tells itself by whose they are: in the base form a file has its own experts only.
    Without any of experts its files are the same in both forms, so that it has the one that divides.
    """
    keys = list(keys)
    if any(re.search(r"\.feed_forward\.w[123]$", key) for key in keys):
        return True
    if any(".experts." in key for key in keys):
        share = args.moe.num_experts // files
        adapters = (re.search(r"\.experts\.(\d+)\.w[123]\.(lora_[ab]\.weight|bias)$", key) for key in keys)
        return any(key and not file * share <= int(key[1]) < (file + 1) * share for key in adapters)
    base, sparse = (obstacles_to_files(args, files, sparse=form) for form in (False, True))
    return bool(base) and not sparse


# What stands behind a matrix's name in a file, by what stands behind it in the stacked parameter's.
_ENDINGS = {"": "weight", "lora_a": "lora_a.weight", "lora_b": "lora_b.weight", "bias": "bias"}


def _single_experts(name: str, file: int, box: Box) -> Iterator[Source]:
    """The per-expert tensors that make up a rank's part of a stacked parameter."""
    whole, tensor = matrix_of(name)
    experts, _, stacked = whole.rpartition(".")
    matrix, _, adapter = stacked.partition("_")
    ending = f"{_ENDINGS[adapter]}.{tensor}" if tensor else _ENDINGS[adapter]
    matrices = (("w1", 0), ("w3", 1)) if matrix == "w13" else (("w2", None),)
    for expert in range(box.start[0], box.start[0] + box.size[0]):
        for single, half in matrices:
            middle = () if half is None else (half,)
            axes = 1 + len(middle)
            part = Box((expert, *middle, *box.start[axes:]), (*(1,) * axes, *box.size[axes:]))
            key = f"{experts}.{expert}.{single}.{ending}"
            yield Source(name, file, key, box.size[axes:], part, _leading_axes(axes))


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _leading_axes(count: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[(None,) * count]


def _stacked_w13(experts: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.view(experts, 1, -1, tensor.shape[-1])


def _stacked_w2(experts: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.view(experts, -1, tensor.shape[-1]).transpose(1, 2)
