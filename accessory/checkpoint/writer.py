"""Writing checkpoints: one tensor in memory at a time, aside first, then under the final name."""

import json
import logging
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data

from accessory.checkpoint.formats import Source
from accessory.config import read_json
from accessory.parallel.plan import Box

logger = logging.getLogger(__name__)


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, aside and renamed."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save(content: Any, path: Path) -> None:
    """torch.save, whose own error on a full disk is a RuntimeError about its archive."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{path} cannot be written: free space, or choose another destination (torch.save: {reason})"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; on success it is synced and renamed over ``path``."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        sync(aside)
        aside.rename(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside ``path`` to fill; on success its files are synced and it is renamed to ``path``.

    Raises:
        FileExistsError: ``path`` is there already and not empty (nothing of the user's is overwritten).
    """
    path = path.resolve()
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        logger.warning("%s was left by an interrupted run: remove it if none is writing it now", leftover)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: remove it first or choose another destination")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        if path.exists():
            path.rmdir()
        aside.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Shelf:
    """Folders of a run, each written aside and renamed when complete, and a file ``latest`` that names one of them.

    A complete folder holds INDEX, whose "files" gives the length of every file; other folders are left alone.
    """

    folder: Path

    INDEX = "state.json"
    LATEST = "latest"

    def aside(self, name: str) -> tuple[Path, Path]:
        """Make a folder to write to; returns it and the free name to `publish` it under.

        A name that is taken gets a number behind it, since replacing a folder is not one step.
        """
        final, number = self.folder / name, 0
        while final.exists():
            number += 1
            final = self.folder / f"{name}.{number}"
        aside = self.folder / f".{final.name}.tmp-{uuid.uuid4().hex[:8]}"
        aside.mkdir(parents=True)
        return aside, final

    def publish(self, aside: Path, final: Path, *, keep_last: int | None = None) -> None:
        """Rename a written folder, then move ``latest`` to it, then remove all but the newest ``keep_last``."""
        sync(aside)
        aside.rename(final)
        sync(self.folder)
        with replacing(self.folder / self.LATEST) as pointer:
            pointer.write_text(final.name + "\n", encoding="utf-8")
        for path in self._half_written():
            shutil.rmtree(path, ignore_errors=True)
        if keep_last is not None:
            for path in [path for path in self._by_age() if path != final][keep_last - 1 :]:
                # Without its index first: a removal that is cut short leaves nothing that looks complete.
                (path / self.INDEX).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Path | None:
        """The folder that ``latest`` names, else the newest complete one; warns of what it passes over."""
        for path in self._half_written():
            logger.warning("ignoring %s: its writing was cut short", path)
        pointer = self.folder / self.LATEST
        if pointer.exists():
            named = self.folder / pointer.read_text(encoding="utf-8").strip()
            reason = self.incomplete(named)
            if not reason:
                return named
            logger.warning("ignoring %s, which %s names: %s", named, pointer, reason)
        for path in self._by_age():
            reason = self.incomplete(path)
            if not reason:
                return path
            logger.warning("ignoring %s: %s", path, reason)
        return None

    @classmethod
    def incomplete(cls, path: Path) -> str:
        """What a folder lacks; empty where it is complete."""
        if not (path / cls.INDEX).is_file():
            return f"it has no {cls.INDEX}"
        try:
            files = read_json(path / cls.INDEX)["files"]
            wrong = [name for name, size in files.items() if (path / name).stat().st_size != size]
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return f"{wrong[0]} is cut short" if wrong else ""

    def _half_written(self) -> list[Path]:
        return sorted(self.folder.glob(".*.tmp-*"))

    def _by_age(self) -> list[Path]:
        """The folders with an index, newest first."""
        indices = sorted(self.folder.glob(f"[!.]*/{self.INDEX}"), key=lambda path: path.stat().st_mtime_ns)
        return [index.parent for index in reversed(indices)]


def sync(path: Path) -> None:
    """Flush a file's or folder's data to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
