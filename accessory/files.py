"""Writing so that nothing is ever half there: aside, synced to the disk, then renamed."""

import errno
import glob
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Seconds between two looks at a lock that another process holds.
_LOOK_EVERY = 0.2


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, aside and renamed."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; on success it is synced and renamed over ``path``."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        sync(aside)
        aside.rename(path)
        sync(path.parent)
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        # A write that finds no room does not say of which file.
        reason = f"{error.strerror} (free some, or choose another destination)"
        raise OSError(error.errno, reason, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """``path`` with the first number before its suffix that no file has yet."""
    return next(free for number in itertools.count(1) if not (free := path.with_stem(f"{path.stem}.{number}")).exists())


@contextmanager
def locked(path: Path, *, on_wait: Callable[[], None], patience: float = math.inf) -> Iterator[bool]:
    """Hold a lock file, after waiting for it; the lock goes with the process, however that ends.

    Args:
        on_wait: is called once, where another process holds it.
        patience: seconds to wait.

    Yields:
        Whether it is held: False where the system or the file system has no locks.

    Raises:
        TimeoutError: another process still held it after that time.
        OSError: the file cannot be opened.
    """
    with path.open("a") as file:
        end, waits = time.monotonic() + patience, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"{path} is locked by another process") from None
                if not waits:
                    on_wait()
                waits = True
                time.sleep(_LOOK_EVERY)
            except (OSError, AttributeError):
                held = False
                break
        yield held


def check_free(path: Path) -> None:
    """See that `new_folder` may write a folder, before long work for it.

    Raises:
        FileExistsError: ``path`` is there already and not empty, or cannot be replaced.
    """
    if not path.exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise FileExistsError(f"{path} exists already: remove it first or choose another destination")
    # A mount point cannot be renamed over, and whoever stands in a folder that was would find it empty.
    current = path.samefile(".")
    if current or path.is_mount():
        what = "the current folder" if current else "a mount point"
        raise FileExistsError(f"{path} is {what}, which cannot be replaced: name a new folder in it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside ``path`` to fill; on success its files are synced and it is renamed to ``path``.

    Raises:
        FileExistsError: as `check_free` (nothing of the user's is overwritten).
    """
    path = path.resolve()
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        logger.warning("%s was left by an interrupted run: remove it if none is writing it now", leftover)
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if aside.exists():  # a container's processes have the same numbers again
        aside = free_name(aside)
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


def sync(path: Path) -> None:
    """Flush a file's or folder's data to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
