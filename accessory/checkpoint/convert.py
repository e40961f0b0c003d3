"""A checkpoint in another layout, number of files or dtype, tensor by tensor; the reference page's split.py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from accessory.checkpoint.containers import SAFETENSORS
from accessory.checkpoint.folder import Folder
from accessory.checkpoint.layouts import BASE, GGUF, Layout, written_layout
from accessory.checkpoint.layouts.gguf import TYPES
from accessory.checkpoint.write import new_checkpoint
from accessory.config import ModelArgs
from accessory.errors import unknown
from accessory.progress import showing


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = BASE.name,
    mp: int | None = None,
    dtype: torch.dtype | None = None,
    type: str | None = None,
    safetensors: bool = False,
    overwrite: bool = False,
    llama_config: Sequence[str | Path] | None = None,
) -> None:
    """Write a checkpoint in another layout, with its config, tokenizer and prompt form beside the weights.

    Any form that the library loads may be the source, whatever its number of files. Both sides are memory-mapped:
    memory use does not grow with the checkpoint.

    Args:
        to: a key of `layouts.WRITTEN`.
        mp: number of shards, of a layout that cuts tensors (default 1).
        dtype: of all weights; None: each keeps its own, and a tensor that is put together from several of unlike
            dtypes gets one that rounds none of them.
        type: of GGUF's matrices, a key of `layouts.gguf.TYPES`; None: that of each one's dtype. Vectors and
            routers are F32, and what blocks of 32 do not divide is F16; MXFP4 are experts alone, beside Q8_0.
        safetensors: write accessory's shards as safetensors files in place of PyTorch's archives.
        overwrite: a folder that is there stays until the new one is whole, and is then exchanged for it.
        llama_config: config files for a source that has none, or to overrule it.

    Raises:
        ValueError: an unknown layout, one that cannot hold such a model, or ``mp`` shards cannot; says what can.
        FileExistsError: the destination is not empty.
        CheckpointError, FileNotFoundError: the source cannot be read.
        OSError: the disk is full.
    """
    folder = Folder(source)
    args = folder.stored_args(llama_config)
    layout = written_layout(to, args)
    _refuse(folder, args, layout, mp, type, dtype)
    weights = folder.weights(args)

    coding = dtype if type is None else TYPES[type][0]
    with (
        new_checkpoint(
            *(destination, layout, args, folder),
            held=weights.held,
            dtype=lambda target: weights.dtype_of(target) if coding is None else coding,
            files=(mp or 1) if layout.cut is not None else None,
            ending=SAFETENSORS if safetensors else None,
            replaces=check_replaceable if overwrite else None,
        ) as writer,
        showing(f"writing {to}", writer.count, unit="tensors") as writing,
        _one_thread(),
    ):
        writer.fill(lambda target, part: weights.read(target.parameter, part), writing.advance)


def check_replaceable(folder: Path) -> None:
    """See that `convert` with ``overwrite`` overwrites nothing but a checkpoint.

    Raises:
        FileExistsError: the folder holds none, or something besides.
    """
    try:
        odd = Folder(folder).odd
    except ValueError:
        raise FileExistsError(f"{folder} is no checkpoint: remove it first or choose another destination") from None
    if odd:
        raise FileExistsError(f"{folder} holds {odd[0]} too, which is no part of a checkpoint: move it away first")


def split(
    source: str | Path, destination: str | Path, *, mp: int = 8, llama_config: Sequence[str | Path] | None = None
) -> None:
    """`convert` to ``mp`` accessory shards."""
    convert(source, destination, mp=mp, llama_config=llama_config)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Meanwhile one thread copies a tensor: between mapped files several would wait for each other at new pages."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse(
    folder: Folder, args: ModelArgs, layout: Layout, mp: int | None, type: str | None, dtype: torch.dtype | None
) -> None:
    if layout.plain and args.quant is not None:
        raise ValueError(
            f"{folder.path} is quantized ({args.quant.type}), which {layout.name} cannot hold: give the weights it was "
            "made of"
        )
    if layout.plain and args.peft is not None:
        raise ValueError(
            f"{folder.path} has adapters or biases, which {layout.name} cannot hold: merge an adapter into its base, "
            "or write it alone with export-adapter"
        )
    if type is not None and layout is not GGUF:
        raise ValueError(f"type {type} is of gguf, and {layout.name} has none: leave it out, or take a dtype")
    if type is not None and dtype is not None:
        raise ValueError(f"both a type ({type}) and a dtype are given: gguf takes one of them")
    if type is not None and type not in TYPES:
        raise ValueError(unknown("type", type, TYPES))
    if mp is None:
        return
    if layout.cut is None:
        raise ValueError(f"{layout.name} has no shards for ranks: leave mp out, any number of ranks reads it")
    obstacles = layout.obstacles(args, mp) if mp >= 1 else ["it must be at least 1"]
    if obstacles:
        works = [n for n in range(1, args.n_heads + 1) if not layout.obstacles(args, n)]
        raise ValueError(f"cannot write {mp} shards: {'; '.join(obstacles)}. Numbers that work: {works}")
