"""Reading the files of tokenizers, which may be there in name only or cut off."""

from collections.abc import Iterator
from pathlib import Path


def read_file(path: Path) -> bytes:
    """The bytes of a file that may be there in name only."""
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {path}: check the path")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: copy or download it again")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder")
    return data


def top_level_fields(data: bytes) -> Iterator[int]:
    """A protobuf message's field numbers, until one is not length-delimited or would run past the end."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while at < len(data) and shift < 64:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value, at
        return 0, len(data) + 1

    at = 0
    while at < len(data):
        tag, at = varint(at)
        size, at = varint(at)
        at += size
        if tag & 7 != 2 or at > len(data):
            return
        yield tag >> 3
