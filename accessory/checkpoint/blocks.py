"""The tensors of GGUF files: plain ones as PyTorch's, and matrices whose rows are coded in blocks.

A block holds so many neighbouring values of a row, codes of few bits beside one or several scales. How they are laid
out is ggml's; the `gguf` package codes and decodes them, and here only what is asked for is decoded.
"""

import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accessory.errors import CheckpointError
from accessory.gguf_header import header_bytes, read_header


@dataclass(frozen=True)
class BlockType:
    """A type of block.

    Attributes:
        name: ggml's.
        size: values in a block.
        nbytes: bytes of a block.
    """

    name: str
    size: int
    nbytes: int

    @property
    def itemsize(self) -> float:
        """Bytes of a value."""
        return self.nbytes / self.size

    def __str__(self) -> str:
        return self.name


# How a file's values are coded.
Coding = torch.dtype | BlockType
# By ggml's numbers; those of the other types are in the `gguf` package.
CODINGS: dict[int, Coding] = {
    0: torch.float32,
    1: torch.float16,
    30: torch.bfloat16,
    2: BlockType("Q4_0", 32, 18),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    39: BlockType("MXFP4", 32, 17),
}
_NUMBERS = {coding: number for number, coding in CODINGS.items()}


class Blocks:
    """A tensor whose rows are coded in blocks; it is indexed as a float32 tensor of its shape, by slices.

    Attributes:
        name: of the tensor and its file, for messages.
        coded: (..., rows, bytes of a row) uint8, the file's own bytes.
    """

    dtype = torch.float32

    def __init__(self, name: str, coded: Tensor, shape: Sequence[int], coding: BlockType) -> None:
        self.name, self.shape, self.coding = name, torch.Size(shape), coding
        self.coded = coded.view(*shape[:-1], shape[-1] // coding.size * coding.nbytes)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        from gguf import GGMLQuantizationType, dequantize

        place, begin, end, skipped = self._place(index)
        values = dequantize(np.ascontiguousarray(self.coded[place].numpy()), GGMLQuantizationType[self.coding.name])
        return torch.from_numpy(values)[..., begin - skipped : end - skipped]

    def __setitem__(self, index: tuple[slice, ...], values: Tensor) -> None:
        from gguf import GGMLQuantizationType, quantize

        place, begin, end, _ = self._place(index)
        assert begin % self.coding.size == end % self.coding.size == 0, "blocks are written whole"
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{self.name} would hold values that are NaN or infinite, which {self.coding} cannot: take the "
                "weights of an earlier step of its training"
            )
        coded = quantize(np.ascontiguousarray(values.float().numpy()), GGMLQuantizationType[self.coding.name])
        self.coded[place] = torch.from_numpy(coded)

    def _place(self, index: slice | tuple[slice, ...]) -> tuple[tuple[slice, ...], int, int, int]:
        """Where in the bytes an index lies: their index, begin and end of the columns, and columns before the first."""
        given = index if isinstance(index, tuple) else (index,)
        *rows, columns = (*given, *[slice(None)] * (len(self.shape) - len(given)))
        size, nbytes = self.coding.size, self.coding.nbytes
        begin, end, _ = columns.indices(self.shape[-1])
        first, last = begin // size, -(-end // size)
        return (*rows, slice(first * nbytes, last * nbytes)), begin, end, first * size


# What a file holds under a name.
Stored = Tensor | Blocks


def nbytes_of(shape: Sequence[int], coding: Coding) -> int:
    """Bytes of a tensor, of whose last axis blocks divide the length."""
    count = math.prod(shape)
    return count // coding.size * coding.nbytes if isinstance(coding, BlockType) else count * coding.itemsize


def seen(name: str, data: Tensor, shape: Sequence[int], coding: Coding) -> Stored:
    """The bytes of a tensor as what it is."""
    return Blocks(name, data, shape, coding) if isinstance(coding, BlockType) else data.view(coding).view(*shape)


def open_gguf(path: Path) -> dict[str, Stored]:
    """Map a GGUF file's tensors into memory, by their names in it; no tensor's bytes are read yet.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is damaged, or has a tensor of a type that is not read; names it.
    """
    header = read_header(path)
    codings = {}
    expected = header.begin
    for own in sorted(header.tensors, key=lambda own: own.offset):
        coding = CODINGS.get(own.type)
        if coding is None:
            raise CheckpointError(_unknown(path, own.name, own.type))
        if isinstance(coding, BlockType) and own.shape[-1] % coding.size:
            raise CheckpointError(
                f"{path}: {own.name} has rows of {own.shape[-1]}, and {coding} has blocks of {coding.size}: it is "
                "damaged, copy it again"
            )
        end = own.offset + nbytes_of(own.shape, coding)
        if own.offset != expected:
            raise CheckpointError(
                f"{path}: {own.name} begins at byte {own.offset:,}, and the one before it ends at {expected:,}: it is "
                "damaged, copy it again"
            )
        if end > header.size:
            raise CheckpointError(
                f"{path} ({header.size:,} bytes) ends before its tensor {own.name}, which goes to byte {end:,}: it is "
                "truncated or damaged, copy it again"
            )
        codings[own.name], expected = coding, end + -end % header.alignment
    if header.size > expected:
        raise CheckpointError(
            f"{path} goes on behind its last tensor, from byte {expected:,} to {header.size:,}: its header is damaged, "
            "copy it again"
        )
    if not header.tensors:
        return {}
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to, as is meant
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)
    return {
        own.name: seen(
            f"{path}: {own.name}",
            whole[own.offset :][: nbytes_of(own.shape, codings[own.name])],
            own.shape,
            codings[own.name],
        )
        for own in header.tensors
    }


def gguf_header(
    tensors: Mapping[str, tuple[tuple[int, ...], Coding]], metadata: Mapping[str, Any]
) -> tuple[bytes, dict[str, int]]:
    """The header of such a file, and where behind it each tensor begins."""
    described = {name: (shape, _NUMBERS[coding], nbytes_of(shape, coding)) for name, (shape, coding) in tensors.items()}
    return header_bytes(metadata, described)


def _unknown(path: Path, name: str, number: int) -> str:
    from gguf import GGMLQuantizationType

    known = ", ".join(str(coding) for coding in CODINGS.values() if isinstance(coding, BlockType))
    try:
        kind = GGMLQuantizationType(number).name
    except ValueError:
        return f"{path}: {name} has the unknown type {number}: it is damaged or of a newer format, copy it again"
    return (
        f"{path}: {name} is {kind}, and of GGUF's types F32, F16, BF16, {known} are read: take one of these files of "
        "the model, or its plain folder, quantized while it is read"
    )
