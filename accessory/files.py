"""Writing so that nothing is ever half there: aside, synced to the disk, then renamed."""

import contextlib
import ctypes
import errno
import glob
import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Which host writes, in the name of what is aside: some file systems lock for one host only. It holds no dot, so that
# nothing of a file `name.more` looks like something of a file `name`.
HOST = re.sub(r"[^\w-]", "-", socket.gethostname())
# Seconds between two looks at a lock that another process holds.
_LOOK_EVERY = 0.2
# Of Linux: places count from the current folder; two names change places.
_HERE, _EXCHANGE = -100, 2
# Bytes by which a file is asked to grow; a full disk may still have some.
_MORE = 1 << 20


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, aside and renamed."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write to; on success it is synced and renamed over ``path``.

    It is there already, empty, and locked for as long as this process writes it: what killed ones have left is removed.
    A link stays, and the file that it leads to is replaced; what is no plain file, such as a pipe or a device, cannot
    be replaced, and is given itself.

    Raises:
        OSError: the file cannot be written; of a full disk it names ``path``.
    """
    if not _is_replaceable(path):
        with _no_room_names(path, path):
            yield path
        return
    target = _behind_links(path)
    remove_leftovers(target)
    aside = _aside(target)
    with _no_room_names(path, aside), contextlib.ExitStack() as stack:
        try:
            aside = stack.enter_context(_locked_file(aside))
            yield aside
            sync(aside)
            aside.rename(target)
            sync(target.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def growing(path: Path) -> Iterator[TextIO]:
    """Open a text that takes the name ``path``, or the place of what has it, when it is whole.

    Until then it lies beside it as ``path``.partial, with a number where that is there; and however the writing is cut
    short, what was flushed stays there. Links, and what is no plain file: as in `replacing`.

    Raises:
        OSError: as `replacing`.
    """
    if not _is_replaceable(path):
        with _no_room_names(path, path), path.open("w", encoding="utf-8") as special:
            yield special
        return
    target = _behind_links(path)
    part = target.with_name(f"{target.name}.partial")
    with _no_room_names(path, part):
        text, part = _new_text(part)
        try:
            with text:
                yield text
                text.flush()
                os.fsync(text.fileno())
            part.rename(target)
            sync(target.parent)
        except BaseException:
            if part.exists():
                if part.stat().st_size:
                    logger.warning("what was written up to here is in %s", part)
                else:
                    part.unlink()
            raise


def check_writable(path: Path) -> None:
    """See that `growing` may write, before long work for it.

    Raises:
        OSError: it may not.
    """
    try:
        if _is_replaceable(path):
            tempfile.TemporaryFile(dir=_behind_links(path).parent).close()
        elif not os.access(path, os.W_OK):  # opening it may wait for who reads
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _is_replaceable(path: Path) -> bool:
    """Whether a file that is renamed to ``path`` takes the place of a file, or of nothing."""
    return path.is_file() or not path.exists()


def _behind_links(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def _no_room_names(path: Path, written: Path) -> Iterator[None]:
    """Meanwhile the error of a full disk names ``path``, though another file is ``written``, and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename not in (None, str(written)):
            raise
        # A write that finds no room does not say of which file.
        reason = f"{error.strerror} (free some, or choose another destination)"
        raise OSError(error.errno, reason, str(path)) from None


def _aside(path: Path) -> Path:
    """Where this process writes what is to become ``path``."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")


def _all_aside(path: Path) -> Iterator[tuple[Path, bool]]:
    """What has a name of `_aside`, or such a one with a number; and whether a process of this host has given it."""
    names = re.compile(rf"\.{re.escape(path.name)}\.(?P<host>[\w-]*)-\d+(\.\d+)?\.tmp")
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if match := names.fullmatch(aside.name):
            yield aside, match["host"] == HOST


def remove_leftovers(path: Path) -> list[Path]:
    """Remove what killed processes of this host have left of `replacing` a file; returns what is gone."""
    return [aside for aside, ours in _all_aside(path) if ours and _remove_if_nobodys(aside)]


@contextmanager
def _locked_file(path: Path) -> Iterator[Path]:
    """Make an empty file and lock it, where the file system has locks; yields its name, which may get a number."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:  # a container's processes have the same numbers again
            path = free_name(path)
            continue
        with contextlib.suppress(OSError, AttributeError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(descriptor, path):
            break
        os.close(descriptor)  # another process has taken it for a leftover before it was locked
    try:
        yield path
    finally:
        os.close(descriptor)


def _new_text(path: Path) -> tuple[TextIO, Path]:
    """Make a text of that name, or with a number; returns it and its name."""
    while True:
        try:
            return path.open("x", encoding="utf-8"), path
        except FileExistsError:
            path = free_name(path)


def _remove_if_nobodys(leftover: Path) -> bool:
    """Remove a file of `replacing` unless a living process holds it, or nobody can tell; returns whether it is gone."""
    with contextlib.suppress(OSError, AttributeError), leftover.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(file.fileno(), leftover):
            leftover.unlink()
            return True
    return False


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether an open file has its name yet."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def free_name(path: Path) -> Path:
    """``path`` with the first number before its suffix that no file has yet."""
    return next(free for number in itertools.count(1) if not (free := path.with_stem(f"{path.stem}.{number}")).exists())


@contextmanager
def locked(
    path: Path, *, on_wait: Callable[[], None] | None = None, patience: float = math.inf, remove: bool = False
) -> Iterator[bool]:
    """Hold a lock file, after waiting for it; the lock goes with the process, however that ends.

    Args:
        on_wait: is called once, where another process holds it.
        patience: seconds to wait.
        remove: the file goes too, at the end.

    Yields:
        Whether it is held: False where the system or the file system has no locks.

    Raises:
        TimeoutError: another process still held it after that time.
        OSError: the file cannot be opened.
    """
    end, waits = time.monotonic() + patience, False
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(f"{path} is locked by another process") from None
                if not waits and on_wait is not None:
                    on_wait()
                waits = True
                time.sleep(_LOOK_EVERY)
                continue
            except (OSError, AttributeError):
                held = False
            # Whoever held it before may have removed it, and the next one holds a new file of this name.
            if not _is_still(file.fileno(), path):
                continue
            try:
                yield held
            finally:
                if remove:
                    path.unlink(missing_ok=True)
            return


def check_free(path: Path) -> None:
    """See that `new_folder` may write a folder, before long work for it.

    Raises:
        FileExistsError: ``path`` is there already and not empty, or cannot be replaced.
    """
    if not path.exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise FileExistsError(f"{path} exists already: remove it first or choose another destination")
    _refuse_held(path)


def _refuse_held(path: Path) -> None:
    # A mount point cannot be renamed over, and whoever stands in a folder that was would find it empty.
    current = path.samefile(".")
    if current or path.is_mount():
        what = "the current folder" if current else "a mount point"
        raise FileExistsError(f"{path} is {what}, which cannot be replaced: name a new folder in it")


@contextmanager
def new_folder(path: Path, *, replaces: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Give a folder beside ``path`` to fill; on success its files are synced and it is renamed to ``path``.

    One process at a time writes it; what killed ones have left is removed. Nothing is left where it fails.

    Args:
        replaces: a folder that is there is exchanged for the new one in one step, and then removed; this is called with
            it before, and raises where it may not be. None: it may not.

    Raises:
        FileExistsError: as `check_free` (nothing of the user's is overwritten).
        OSError: another process is writing it; it cannot be written.
    """
    path = path.resolve()

    def check() -> None:
        if replaces is not None and path.is_dir() and any(path.iterdir()):
            _refuse_held(path)
            replaces(path)
        else:
            check_free(path)

    check()
    with parents_of(path), contextlib.ExitStack() as stack:
        alone = stack.enter_context(_alone_at(path))
        check()  # it may have been written meanwhile
        _remove_left_folders(path, alone=alone)
        aside = _aside(path)
        if aside.exists():  # a container's processes have the same numbers again
            aside = free_name(aside)
        aside.mkdir()
        stack.callback(shutil.rmtree, aside, ignore_errors=True)
        yield aside
        put_in_place(aside, path)


def put_in_place(aside: Path, path: Path) -> None:
    """Give a finished folder its name, when its files are on the disk; what was there lies aside then."""
    by_umask(aside)
    for file in aside.rglob("*"):
        sync(file)
    sync(aside)
    if path.exists() and any(path.iterdir()):
        exchange(aside, path)
    else:
        if path.exists():
            path.rmdir()
        aside.rename(path)
    sync(path.parent)


def exchange(first: Path, second: Path) -> None:
    """Exchange the names of two folders, in one step where the system can do that.

    Else ``second`` is called ``second``.old for a moment, and a process that is killed then leaves it under that name.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        places = (_HERE, os.fsencode(first), _HERE, os.fsencode(second))
        if library.renameat2(*places, _EXCHANGE) == 0:
            return
    between = second.with_name(f"{second.name}.old")
    second.rename(between)
    first.rename(second)
    between.rename(first)


@contextmanager
def _alone_at(path: Path) -> Iterator[bool]:
    """Hold the lock file beside a folder that is to be written; False where the file system has no locks."""
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(locked(lock, patience=0, remove=True))
        except TimeoutError:
            raise OSError(f"another process is writing {path}: wait for it, or choose another destination") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        yield alone


def _remove_left_folders(path: Path, *, alone: bool) -> None:
    """Remove what killed processes have left of a folder; what may be a living one's is only named.

    Args:
        alone: no other process of this host writes it.
    """
    for aside, ours in _all_aside(path):
        if not aside.is_dir():
            continue
        if alone and ours:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            logger.warning("%s was left by an interrupted run: remove it if none is writing it now", aside)


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders that ``path`` is to lie in; where what follows fails, those that were not there go again."""
    made = make_folders(path.parent)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def make_folders(path: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were not there, the innermost first.

    Raises:
        OSError: it cannot be made; a file stands in its place or in a parent's.
    """
    absent = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    there = absent[-1].parent if absent else path
    if there.exists() and not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, and no folder", str(there))
    path.mkdir(parents=True, exist_ok=True)
    return absent


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders that are empty, each after those within it."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def no_room(error: BaseException, path: Path) -> str | None:
    """The system's word for a write that found no room, such as "No space left on device"; None for other errors.

    PyTorch's writer of archives loses that word and leaves one about its own place in the file: so the file is asked
    to grow once more, which spoils it.

    Args:
        path: the file that was to be written, or a folder of such files.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    if "inline_container" not in str(error):
        return None
    try:
        for file in path.iterdir() if path.is_dir() else [path]:
            with file.open("ab") as end:
                end.write(bytes(_MORE))
    except OSError as more:
        return more.strerror
    return "the disk took less than was written"


def by_umask(folder: Path) -> None:
    """Give all that is in a folder the mode that the process's umask gives, as the folder itself has it.

    Some libraries write files that only their owner may read, and a copied folder is as read-only as the other.
    """
    mode = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        wanted = mode if path.is_dir() else mode & 0o666
        if path.stat().st_mode & 0o777 != wanted:
            with contextlib.suppress(OSError):  # some file systems have one mode for everything
                path.chmod(wanted)


def sync(path: Path) -> None:
    """Flush a file's or folder's data to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
