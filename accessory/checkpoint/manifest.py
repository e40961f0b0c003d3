"""manifest.json: the size and the SHA-256 of every file of a folder, to see later whether it is as it was written."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from accessory.checkpoint.companions import MANIFEST_NAME
from accessory.config import read_json
from accessory.errors import CheckpointError
from accessory.files import write_json
from accessory.progress import showing

# Of a file, as it stands in a manifest: "bytes" and "sha256".
Sum = dict[str, Any]
# Bytes that are read at once, and parts of a file that wait to be summed.
_AT_ONCE, _WAITING = 1 << 20, 4
# Bytes of a file that are sent to the disk together.
_SENT_AT_ONCE = 1 << 26


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
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: only folders that convert wrote can be verified")
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


class SummedFile:
    """A file that has its size, filled from front to back; a thread beside the one that writes it sums its bytes.

    So they are summed while they are in a core's cache, and are on their way to the disk from then on, which would else
    begin when the system has no more room.
    """

    def __init__(self, path: Path, thread: Executor) -> None:
        self._path, self._thread = path, thread
        self._hash = hashlib.sha256()
        self._end = self._sent = 0  # written; on its way to the disk
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        self._file = self._path.open("r+b", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keep(self, place: int) -> None:
        """What stands in the file before ``place`` stays."""
        while self._end < place:
            self._pass(os.pread(self._file.fileno(), min(_AT_ONCE, place - self._end), self._end))

    def write(self, data: Tensor) -> None:
        """Go on with such bytes, uint8, which are the file's from here on."""
        view, done = memoryview(data.numpy()), 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], self._end + done)
        self._pass(view)

    def finish(self) -> Sum:
        """Keep the rest; the sum of all."""
        self.keep(os.fstat(self._file.fileno()).st_size)
        for task in self._waiting:
            task.result()
        return {"bytes": self._end, "sha256": self._hash.hexdigest()}

    def _pass(self, data: bytes | memoryview) -> None:
        self._end += len(data)
        self._waiting.append(self._thread.submit(self._hash.update, data))
        if len(self._waiting) > _WAITING:
            self._waiting.popleft().result()
        if self._end - self._sent >= _SENT_AT_ONCE:
            # Of pages that wait to be written this writes them, and waits for none.
            os.posix_fadvise(self._file.fileno(), self._sent, self._end - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._end


def _sums(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Sum]]:
    """Of each file its sum; several are read at once."""
    with ThreadPoolExecutor() as pool, showing("summing", len(names), unit="files") as summing:
        for name, found in zip(names, pool.map(lambda name: _sum_of(folder / name), names), strict=True):
            summing.advance()
            yield name, found


def _sum_of(path: Path) -> Sum:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
