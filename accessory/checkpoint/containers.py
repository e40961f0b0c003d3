"""Files of tensors: PyTorch's archives, safetensors and GGUF, mapped for reading and for writing.

Nothing in a file is executed. Both ways no tensor's bytes are in memory until they are asked for, and then they are the
file's own pages.
"""

import json
import math
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from accessory.checkpoint.blocks import Blocks, Coding, Stored, gguf_header, nbytes_of, open_gguf, seen
from accessory.checkpoint.joined import Unmapped, open_joined
from accessory.errors import CheckpointError, first_line
from accessory.files import no_room, replacing
from accessory.gguf_header import SUFFIX

SAFETENSORS = ".safetensors"
# How torch.save began a file before it wrote zip archives: its magic number, pickled.
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# Of safetensors: the names of dtypes, and to how many bytes the header is filled up.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNED = 8

# Shape and dtype of a tensor that is to be written; the second may be a type of GGUF in a file of that form.
Wanted = tuple[tuple[int, ...], Coding]


def open_tensors(path: Path, *more: Path) -> dict[str, Tensor]:
    """Map a file of tensors into memory, by their names in it; no tensor's bytes are read yet.

    Args:
        more: files that go on where it ends: one archive, cut into several.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, in PyTorch's old format, or holding anything but tensors (nothing of such a
            pickle is executed).
    """
    for file in (path, *more):
        if not file.exists():
            raise FileNotFoundError(f"shard {file} does not exist: copy it again")
        if not file.is_file():
            raise CheckpointError(f"{file} is no plain file. Copy it again")
    try:
        content = _content(path, *more)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read ({error.strerror}): change its permissions") from None
    except Exception as error:  # damage can surface as almost any type
        hint = f", with the {len(more)} files that go on with it" if more else ""
        raise CheckpointError(_unreadable(path, error) + hint) from None
    if not content and path.suffix != SUFFIX:  # the first of a set may hold metadata alone
        raise CheckpointError(f"{path} holds no dictionary of tensors: copy it again, or save the weights alone")
    for key, value in content.items():
        if isinstance(value, Unmapped | Blocks):
            continue
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {key!r} is a {type(value).__name__}, not a named tensor; remove it and save the weights alone"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {key} is no dense tensor with data ({value.layout}, {value.device}); save it as one"
            )
    return content


def _content(path: Path, *more: Path) -> dict[Any, Any]:
    if path.suffix == SUFFIX:
        return dict(open_gguf(path))
    if path.suffix == SAFETENSORS:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    content = open_joined((path, *more)) if more else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    return dict(content) if isinstance(content, dict) else {}


def _unreadable(path: Path, error: Exception) -> str:
    """One line on a file that was refused; torch.load's own message may be a page that recommends to trust it."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        if match := re.search(r"GLOBAL (\S+)", text):
            return (
                f"{path} holds more than plain tensors ({match[1]}) and was refused, nothing in it was executed. "
                "Get the weights from a source that you trust"
            )
        text = "its pickle is broken"
    elif "_use_new_zipfile_serialization" in text:
        with path.open("rb") as file:
            if file.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
                return (
                    f"{path} is in PyTorch's old format (before 1.6), which cannot be mapped: "
                    "read it with torch.load(..., weights_only=True) and write it again with torch.save"
                )
        text = "no zip archive"
    reason = first_line(text, otherwise=type(error).__name__)
    no_such = {SAFETENSORS: "no safetensors", SUFFIX: "no GGUF"}.get(path.suffix, "not a PyTorch")
    size = path.stat().st_size
    return f"{path} ({size:,} bytes) is damaged, truncated or {no_such} file ({reason}). Copy it again"


def lay_out(path: Path, tensors: Mapping[str, Wanted], metadata: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Write the skeleton of a file of tensors, every byte of theirs still a hole; returns where in it each begins.

    An archive is {"model": {key: tensor}}; its zip checksums are those of the holes, and torch.load does not look at
    them.

    Args:
        path: a name that ends in .safetensors or .gguf, or any other for an archive.
        metadata: of a GGUF file.

    Raises:
        OSError: the disk is full.
    """
    if path.suffix in (SAFETENSORS, SUFFIX):
        header, places = gguf_header(tensors, metadata or {}) if path.suffix == SUFFIX else _header(tensors)
        places = {key: len(header) + place for key, place in places.items()}
        size = len(header)
    else:
        header, places = b"", _archive_of_holes(path, tensors)
        size = path.stat().st_size
    size = max([size, *(place + nbytes_of(*tensors[key]) for key, place in places.items())])
    try:
        if header:
            path.write_bytes(header)
        # All bytes at once: a store into a mapped hole on a full disk would kill the process.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        reason = f"{error.strerror} (it takes {size:,} bytes: free some, or choose another destination)"
        raise OSError(error.errno, reason, str(path)) from None
    return places


def create_tensors(
    path: Path, tensors: Mapping[str, Wanted], metadata: Mapping[str, Any] | None = None
) -> dict[str, Stored]:
    """`lay_out` a file of tensors and map it for writing, so that one of any size is filled in bounded memory."""
    places = lay_out(path, tensors, metadata)
    whole = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    return {
        key: seen(f"{path}: {key}", whole[place:][: nbytes_of(*tensors[key])], *tensors[key])
        for key, place in places.items()
    }


def _archive_of_holes(path: Path, tensors: Mapping[str, Wanted]) -> dict[str, int]:
    """Save an archive without its tensors' bytes; returns where in it each is to lie."""
    # Nobody looks at their values: those of a dtype share their memory, of which no page is ever there.
    size = 1 + max((nbytes_of(*wanted) for wanted in tensors.values()), default=0)
    dtypes = {key: _plain(coding) for key, (_, coding) in tensors.items()}
    memory = {dtype: mmap.mmap(-1, size, mmap.MAP_PRIVATE, mmap.PROT_READ) for dtype in {*dtypes.values()}}
    with warnings.catch_warnings(), skip_data():
        warnings.simplefilter("ignore", UserWarning)  # that they cannot be written to
        holes = {key: _hole(memory[dtypes[key]], shape, dtypes[key]) for key, (shape, _) in tensors.items()}
        _save({"model": holes}, path)
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = {Path(info.filename).parts[1:]: info.header_offset for info in archive.infolist()}
        for number, key in enumerate(tensors):  # as PyTorch counts them
            begin = records["data", str(number)]
            file.seek(begin + 26)  # in a zip a file's header ends with the lengths of its name and of what follows that
            places[key] = begin + 30 + sum(struct.unpack("<HH", file.read(4)))
    return places


def _hole(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape) if count else torch.empty(shape, dtype=dtype)


def _plain(coding: Coding) -> torch.dtype:
    assert isinstance(coding, torch.dtype), f"only GGUF holds {coding}"
    return coding


def _header(tensors: Mapping[str, Wanted]) -> tuple[bytes, dict[str, int]]:
    """A safetensors file's header, and where behind it each tensor begins: wide ones first, so that all are aligned."""
    places: dict[str, int] = {}
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for key in sorted(tensors, key=lambda key: (-tensors[key][1].itemsize, key)):
        shape, dtype = tensors[key]
        places[key], end = place, place + nbytes_of(shape, dtype)
        described[key] = {"dtype": _DTYPES[_plain(dtype)], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text, places


def save_archive(path: Path, tensors: Mapping[str, Tensor]) -> None:
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
