"""manifest.json: the size and the SHA-256 of every file of a folder, to see later whether it is as it was written."""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.companions import MANIFEST_NAME
from accessory.config import read_json
from accessory.errors import CheckpointError
from accessory.files import write_json
from accessory.progress import showing

# Of a file, as it stands in a manifest: "bytes" and "sha256".
Sum = dict[str, Any]
# Bytes that are written at once, and how many such blocks are filled, written or summed at a time.
_BLOCK, _BLOCKS = 1 << 21, 6


def write_manifest(folder: Path, known: Mapping[str, Sum] | None = None) -> None:
    """Write the sums of all files of a finished folder, for `check_manifest`.

    Args:
        known: those that were reckoned before (`SummedFile`), by the files' names.
    """
    known = known or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    found = {**known, **dict(_sums(folder, [name for name in names if name not in known]))}
    write_json(folder / MANIFEST_NAME, {"files": {name: found[name] for name in names}})


def check_manifest(folder: Path) -> int:
    """Hold a folder's files against its manifest; returns how many they are.

    Raises:
        CheckpointError: there is no manifest, or a file is missing or is not as it was written.
        FileNotFoundError: there is no folder.
    """
    path = folder / MANIFEST_NAME
    if not folder.exists():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist: check the path")
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}: it was not written by one of these commands, or by an earlier version"
        )
    said = read_json(path).get("files")
    if not isinstance(said, dict) or not all(isinstance(one, dict) for one in said.values()):
        raise CheckpointError(f"{path} lists no files with their sizes and sums: copy it again")
    for name, wanted in said.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which {MANIFEST_NAME} lists: copy it again")
        size = file.stat().st_size
        if size != wanted.get("bytes"):
            raise CheckpointError(f"{file} has {size} bytes and was written with {wanted.get('bytes')}: copy it again")
    for name, found in _sums(folder, list(said)):
        if found != said[name]:
            raise CheckpointError(f"{folder / name} is not as it was written (its SHA-256 differs): copy it again")
    return len(said)


class SummedFile(contextlib.ExitStack):
    """A file that has its size, filled from front to back: two threads write and sum it, beside the one that fills it.

    It is written past the system's cache where the file system can do that: a copy into the cache, its pages and their
    way to the disk took more of a core than all the rest, and the end would wait for them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = self.enter_context(path.open("r+b", buffering=0))
        self._kept = self.enter_context(path.open("rb"))
        self._summing, self._writing = (self.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        self._hash = hashlib.sha256()
        blocks = [mmap.mmap(-1, _BLOCK) for _ in range(_BLOCKS)]  # memory that begins with a page, as such writes want
        self._free = deque(torch.frombuffer(block, dtype=torch.uint8) for block in blocks)
        self._busy: deque[tuple[Tensor, Future[None], Future[None]]] = deque()
        self._end = 0
        self._set_direct(True)

    def keep(self, place: int) -> None:
        """What stands in the file before ``place`` stays."""
        while self._end < place:
            data = os.pread(self._kept.fileno(), min(_BLOCK, place - self._end), self._end)
            self.write(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def write(self, data: Tensor) -> None:
        """Go on with such bytes, uint8."""
        while len(data):
            if not self._free:
                self._free.append(self._done())
            filled = self._end % _BLOCK
            count = min(len(data), _BLOCK - filled)
            self._free[0][filled : filled + count] = data[:count]
            data, self._end = data[count:], self._end + count
            if filled + count == _BLOCK:
                self._send(_BLOCK)

    def finish(self) -> Sum:
        """Keep the rest; the sum of all."""
        self.keep(os.fstat(self._kept.fileno()).st_size)
        self._send(self._end % _BLOCK)
        while self._busy:
            self._done()
        return {"bytes": self._end, "sha256": self._hash.hexdigest()}

    def _send(self, count: int) -> None:
        if count:
            block = self._free.popleft()
            data = block.numpy().data[:count]
            write = self._writing.submit(self._put, data, self._end - count)
            self._busy.append((block, self._summing.submit(self._hash.update, data), write))

    def _done(self) -> Tensor:
        block, *tasks = self._busy.popleft()
        for task in tasks:
            task.result()
        return block

    def _put(self, data: memoryview, place: int) -> None:
        if len(data) % mmap.PAGESIZE:  # the end
            self._set_direct(False)
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._file.fileno(), data[done:], place + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._set_direct(False):
                    raise

    def _set_direct(self, direct: bool) -> bool:
        """Write past the cache, or no longer; returns whether that is a change."""
        before = fcntl.fcntl(self._file, fcntl.F_GETFL)
        wanted = before | os.O_DIRECT if direct else before & ~os.O_DIRECT
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.fcntl(self._file, fcntl.F_SETFL, wanted)
        return before != wanted


def _sums(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Sum]]:
    """Of each file its sum; several are read at once."""
    with ThreadPoolExecutor() as pool, showing("summing", len(names), unit="files") as summing:
        for name, found in zip(names, pool.map(lambda name: sum_of(folder / name), names), strict=True):
            summing.advance()
            yield name, found


def sum_of(path: Path) -> Sum:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
