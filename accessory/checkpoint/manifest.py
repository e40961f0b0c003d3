"""manifest.json: the size and the SHA-256 of every file of a folder, to see later whether it is as it was written."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accessory.checkpoint.companions import MANIFEST_NAME
from accessory.config import read_json
from accessory.errors import CheckpointError
from accessory.files import write_json
from accessory.progress import showing

# Of a file, as it stands in a manifest: "bytes" and "sha256".
Sum = dict[str, Any]
# Bytes that are read at once; they stay in a core's cache while they are summed.
_AT_ONCE = 1 << 20


def write_manifest(folder: Path, known: Mapping[str, Sum] | None = None) -> None:
    """Write the sums of all files of a finished folder, for `check_manifest`.

    Args:
        known: those that were reckoned before (`Summing`), by the files' names.
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


class Summing:
    """Sums of files while they are written from front to back, by a thread beside the one that writes them.

    What is summed is on its way to the disk from then on, which would else begin when the system has no more room.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[Path, _Prefix] = {}
        self._tasks: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        for own in self._begun.values():
            own.file.close()

    def reached(self, path: Path, end: int) -> None:
        """A file's bytes before ``end`` are as they stay."""
        if path not in self._begun:
            self._begun[path] = _Prefix(path.open("rb", buffering=0))
        self._tasks.append(self._thread.submit(self._begun[path].go_on, end))

    def whole(self, path: Path) -> None:
        """All of a file's bytes are as they stay."""
        self.reached(path, path.stat().st_size)

    def sums(self) -> dict[str, Sum]:
        """Those of the files that are whole, by their names; waits for them."""
        for task in self._tasks:
            task.result()
        return {path.name: own.sum for path, own in self._begun.items()}


class _Prefix:
    """What is summed of a file."""

    def __init__(self, file: FileIO) -> None:
        self.file, self._end, self._hash = file, 0, hashlib.sha256()

    @property
    def sum(self) -> Sum:
        return {"bytes": self._end, "sha256": self._hash.hexdigest()}

    def go_on(self, end: int) -> None:
        buffer, begin = memoryview(bytearray(_AT_ONCE)), self._end
        while self._end < end:
            count = self.file.readinto(buffer[: end - self._end])
            assert count, "the file has these bytes"
            self._hash.update(buffer[:count])
            self._end += count
        # Of pages that wait to be written this writes them, and waits for none.
        os.posix_fadvise(self.file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def _sums(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Sum]]:
    """Of each file its sum; several are read at once."""
    with ThreadPoolExecutor() as pool, showing("summing", len(names), unit="files") as summing:
        for name, found in zip(names, pool.map(lambda name: _sum_of(folder / name), names), strict=True):
            summing.advance()
            yield name, found


def _sum_of(path: Path) -> Sum:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
