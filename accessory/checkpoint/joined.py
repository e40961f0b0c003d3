"""One archive of PyTorch's that lies cut into several files, as the torrent has it, read without joining them first."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode


class Unmapped:
    """A tensor whose bytes do not lie in one piece of a file: they are read anew for whatever is asked of it.

    Attributes:
        shape: as a tensor has it.
        dtype: likewise.
    """

    def __init__(self, like: Tensor, pieces: Sequence[Tensor]) -> None:
        self.shape, self.dtype = like.shape, like.dtype
        self._stride, self._offset, self._pieces = like.stride(), like.storage_offset(), pieces

    def __getitem__(self, index: Any) -> Tensor:
        whole = torch.cat(list(self._pieces)).view(self.dtype)
        found: Tensor = whole.as_strided(self.shape, self._stride, self._offset)[index]
        return found


def open_joined(paths: Sequence[Path]) -> Any:
    """What torch.load finds in the archive that the files make up; its tensors are mapped, of none bytes are read.

    Raises:
        Exception: whatever torch.load raises of a damaged archive.
    """
    with _Joined(paths) as joined, FakeTensorMode():
        content = torch.load(joined, weights_only=True)  # type: ignore[arg-type]  # it reads what can be read from
    maps = [torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8) for path in paths]
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict):
        return tensors
    return {key: _mapped(own, maps) if isinstance(own, Tensor) else own for key, own in tensors.items()}


def _mapped(fake: Tensor, maps: Sequence[Tensor]) -> Any:
    """A tensor whose storage is a part of the joined maps."""
    storage = fake.untyped_storage()
    first = storage._checkpoint_offset  # PyTorch's, of what it has not read
    assert first is not None
    starts = itertools.accumulate((len(own) for own in maps), initial=0)
    pieces = []
    for own, start in zip(maps, starts, strict=False):
        begin, end = max(first, start), min(first + storage.nbytes(), start + len(own))
        if begin < end:
            pieces.append(own[begin - start : end - start])
    if sum(len(piece) for piece in pieces) < storage.nbytes():
        raise EOFError("its files end before its tensors")
    whole = pieces[0]
    if len(pieces) > 1 or whole.storage_offset() % fake.dtype.itemsize:
        return Unmapped(fake, pieces)
    return whole.view(fake.dtype).as_strided(
        fake.shape, fake.stride(), whole.storage_offset() // fake.dtype.itemsize + fake.storage_offset()
    )


class _Joined(io.RawIOBase):
    """Files as one, to be read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._files = [path.open("rb") for path in paths]
        self._starts = [0, *itertools.accumulate(path.stat().st_size for path in paths)]
        self._place = 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._starts[-1]}[whence] + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        view, count = memoryview(buffer).cast("B"), 0
        for file, (start, end) in zip(self._files, itertools.pairwise(self._starts), strict=True):
            if start <= self._place < end:
                file.seek(self._place - start)
                got = file.readinto(view[count : count + end - self._place])
                count, self._place = count + got, self._place + got
        return count
