"""The header of a GGUF file, read and written: a model's metadata, and where in the file its tensors lie.

The format is ggml's (docs/gguf.md in its repository), version 3, of which version 2 differs in nothing here, and
little-endian: magic, version, the counts of tensors and of keys; then every key with its value; then every tensor's
name, lengths (innermost first), type and place; then, aligned, the tensors. Nothing in a header is believed: what it
says of lengths and counts is held against the file's size before memory is taken for it.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from accessory.errors import CheckpointError, shown

SUFFIX = ".gguf"
# Of one of a set that was split.
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<file>\d{5})-of-(?P<files>\d{5})\.gguf")
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY = "general.alignment"
ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# As the modules struct and NumPy name them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _FLOAT32, _BOOL, _UINT64 = 4, 6, 7, 10
_NUMBERS = {np.dtype(f"<{letter}"): number for number, letter in _SCALARS.items()}
# What no header of a model comes near, and a damaged one would have us read: keys, tensors, entries of all arrays, and
# bytes of all strings.
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 18
_MOST_ENTRIES = 1 << 22
_MOST_BYTES = 1 << 27
_MOST_AXES = 4


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of the file.

    Attributes:
        shape: outermost axis first.
        type: ggml's number of how its values are coded.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        values: metadata by key: numbers, strings, lists of strings, and arrays of numbers.
        begin: of the tensors, each of which follows the one before at the next multiple of ``alignment``.
        size: of the whole file in bytes.
    """

    path: Path
    values: Mapping[str, Any] = field(repr=False)
    tensors: tuple[TensorPlace, ...] = field(repr=False)
    begin: int
    alignment: int
    size: int


def folder_of(place: Path) -> Path:
    """The folder of a model's place, which is that folder itself or one of its GGUF files."""
    return place.parent if place.suffix == SUFFIX and place.is_file() else place


def set_of(name: str, names: Iterable[str]) -> list[str]:
    """Of a folder's files those that are one model's with a GGUF file: itself, or the set that was split."""
    own = SPLIT_NAME.fullmatch(name)
    if own is None:
        return [name]
    matches = (match for other in names if (match := SPLIT_NAME.fullmatch(other)))
    return sorted(match.string for match in matches if match["stem"] == own["stem"])


def are_one(names: Sequence[str]) -> bool:
    """Whether GGUF files are one model's by their names: a single one, or what was split."""
    splits = [match for name in names if (match := SPLIT_NAME.fullmatch(name))]
    return len(names) == 1 or (len(splits) == len(names) and len({match["stem"] for match in splits}) == 1)


def read_header(path: Path) -> Header:
    """Read a file's header.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is damaged, or of a version or byte order that is not read; names the file.
    """
    if not path.is_file():
        if path.exists():
            raise CheckpointError(f"{path} is no plain file. Copy it again")
        raise FileNotFoundError(f"{path} does not exist: copy it again")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(f"{path} ({size:,} bytes) is no GGUF file, or damaged. Copy it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).header()
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read ({error.strerror}): change its permissions") from None


class _Reader:
    """A place in a header, which moves on as it is read."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._at = len(_MAGIC)
        self._entries, self._bytes = _MOST_ENTRIES, _MOST_BYTES

    def header(self) -> Header:
        version = self._number(_UINT32)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            said = "is big-endian" if swapped else f"has version {version} of the format"
            raise CheckpointError(f"{self._path} {said}, which is not read: convert the model again with llama.cpp")
        tensors, keys = self._number(_UINT64), self._number(_UINT64)
        if keys > _MOST_KEYS or tensors > _MOST_TENSORS:
            self._damaged(f"it claims {keys} keys and {tensors} tensors")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            if key in values:
                self._damaged(f"it has the key {shown(key)} twice")
            values[key] = self._value(self._number(_UINT32))
        places = {}
        for _ in range(tensors):
            place = self._place()
            if place.name in places:
                self._damaged(f"it has the tensor {shown(place.name)} twice")
            places[place.name] = place
        alignment = values.get(_ALIGNMENT_KEY, ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            self._damaged(f"{_ALIGNMENT_KEY} is {shown(alignment)}")
        begin = self._at + -self._at % alignment
        for place in places.values():
            if place.offset % alignment or begin + place.offset > self._size:
                self._damaged(f"tensor {shown(place.name)} begins at byte {place.offset} behind its header")
        moved = (TensorPlace(own.name, own.shape, own.type, begin + own.offset) for own in places.values())
        return Header(self._path, values, tuple(moved), begin, alignment, self._size)

    def _place(self) -> TensorPlace:
        name = self._string()
        axes = self._number(_UINT32)
        if not 1 <= axes <= _MOST_AXES:
            self._damaged(f"tensor {shown(name)} has {axes} axes")
        lengths = [self._number(_UINT64) for _ in range(axes)]
        if not all(lengths) or math.prod(lengths) >= 1 << 48:
            self._damaged(f"tensor {shown(name)} has the lengths {lengths}")
        return TensorPlace(name, tuple(reversed(lengths)), self._number(_UINT32), self._number(_UINT64))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(kind)
        if kind != _ARRAY:
            self._damaged(f"a value has the unknown type {kind}")
        kind, count = self._number(_UINT32), self._number(_UINT64)
        self._entries -= count
        if kind not in (_STRING, *_SCALARS) or self._entries < 0:
            self._damaged(f"an array claims {count} entries of type {kind}")
        if kind == _STRING:
            return self._strings(count)
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _number(self, kind: int) -> Any:
        form = f"<{_SCALARS[kind]}"
        (found,) = struct.unpack(form, self._take(struct.calcsize(form)))
        # Of a float32 the shortest decimal that it stands for: 1e-5, and not 9.99999974738e-06.
        return float(str(np.float32(found))) if kind == _FLOAT32 else found

    def _string(self) -> str:
        count = self._number(_UINT64)
        self._bytes -= count
        if self._bytes < 0:
            self._damaged(f"a text claims {count} bytes")
        try:
            return self._take(count).decode()
        except UnicodeDecodeError:
            self._damaged(f"a text that ends at byte {self._at} is not UTF-8")

    def _strings(self, count: int) -> list[str]:
        """So many texts: as `_string`, of hundreds of thousands of tokens."""
        data, begin = self._data, self._at
        size = min(self._size, begin + 8 * count + self._bytes)
        length_at = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            at = self._at + 8
            end = at + length_at(data, at - 8)[0] if at <= size else size + 1
            if end > size:
                self._damaged("it ends in the midst of its header, or a text claims too many bytes")
            found.append(data[at:end])
            self._at = end
        self._bytes -= self._at - begin - 8 * count
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError:
            self._damaged(f"a text before byte {self._at} is not UTF-8")

    def _take(self, count: int) -> bytes:
        begin, self._at = self._at, self._at + count
        if self._at > self._size:
            self._damaged("it ends in the midst of its header")
        return self._data[begin : self._at]

    def _damaged(self, reason: str) -> NoReturn:
        raise CheckpointError(
            f"{self._path} ({self._size:,} bytes) is damaged, truncated or no GGUF file ({reason}). Copy it again"
        )


def header_bytes(
    values: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, int]]
) -> tuple[bytes, dict[str, int]]:
    """A file's header, and where behind it each tensor begins, in their order.

    Args:
        values: metadata; an int is written as uint32, a float as float32, an array as it is.
        tensors: of each its shape, outermost axis first, the number of its type, and its bytes.
    """
    parts = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(values))]
    for key, value in values.items():
        parts += [_text(key), *_written(value)]
    places, place = {}, 0
    for name, (shape, kind, size) in tensors.items():
        places[name] = place
        lengths = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_text(name), lengths, struct.pack("<IQ", kind, place)]
        place += size + -size % ALIGNMENT
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % ALIGNMENT), places


def _written(value: Any) -> Iterator[bytes]:
    """A value with its type before it."""
    if isinstance(value, str):
        yield struct.pack("<I", _STRING) + _text(value)
    elif isinstance(value, list):
        yield struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        yield from map(_text, value)
    elif isinstance(value, np.ndarray):
        yield struct.pack("<IIQ", _ARRAY, _NUMBERS[value.dtype], value.size) + value.tobytes()
    else:
        kind = _BOOL if isinstance(value, bool) else _FLOAT32 if isinstance(value, float) else _UINT32
        yield struct.pack(f"<I{_SCALARS[kind]}", kind, value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
