"""Writing checkpoints: one tensor in memory at a time, aside first, then under the final name."""

import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data

from accessory.checkpoint.formats import Source
from accessory.errors import first_line
from accessory.files import no_room, replacing
from accessory.parallel.box import Box


def create_shard(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Write the skeleton of a shard and map it for writing: {"model": {key: tensor}}, every byte still a hole.

    The returned tensors lie in the file itself (a shared mapping), so that a file of any size is filled in
    bounded memory. Their zip checksums are those of the holes; torch.load does not look at them.

    Args:
        tensors: shape and dtype of each key.

    Raises:
        OSError: the disk is full.
    """
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        _save({"model": {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in tensors.items()}}, path)
    size = path.stat().st_size
    # A store into a mapped hole on a full disk would kill the process; here it is an ordinary OSError.
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            reason = f"{error.strerror} (it takes {size:,} bytes: free some, or choose another destination)"
            raise OSError(error.errno, reason, str(path)) from None
    with set_default_mmap_options(mmap.MAP_SHARED):
        mapped: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)["model"]
    return mapped


def export_shard(parameters: Mapping[str, Tensor], sources: Iterable[Source]) -> dict[str, Tensor]:
    """One file's tensors, without prefix, cut out of whole parameters."""
    tensors = {}
    for source in sources:
        parameter = parameters[source.parameter].detach()
        tensor = torch.empty(source.shape, dtype=parameter.dtype)
        source.view(tensor).copy_(parameter[source.box.within(Box.whole(tuple(parameter.shape)))])
        tensors[source.key] = tensor
    return tensors


def save_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """torch.save of a bare dictionary, aside and renamed."""
    with replacing(path) as aside:
        _save(dict(tensors), aside)


def _save(content: Any, path: Path) -> None:
    """torch.save, whose own error on a full disk is a RuntimeError about its archive."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        reason = no_room(error, path) or first_line(str(error), otherwise="torch.save failed")
        raise OSError(f"{path} cannot be written ({reason}): free space, or choose another destination") from None
