"""Checkpoints on Hugging Face's Hub: hf://org/name[/sub/folder][/file][@revision], and what is downloaded of them.

huggingface_hub keeps the files, locks them while a process downloads them, and knows the token, the cache and the Hub's
address (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE). It is imported where it is asked, so that nobody else waits
for it.
"""

import functools
import glob
import logging
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from accessory.checkpoint.companions import COMPANIONS
from accessory.checkpoint.layouts import INDEX_NAMES, Found, choose_weights
from accessory.errors import CheckpointError, first_line, shown, shown_bytes
from accessory.gguf_header import SUFFIX, set_of
from accessory.launch.launcher import Launch
from accessory.progress import Progress, showing
from accessory.text.form_files import MORE_TEMPLATES

logger = logging.getLogger(__name__)

# A Path has one slash of two.
_BEGINS = re.compile(r"hf:/{1,2}")
_FORM = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?P<folder>(/[^/@]+)*)/?(@(?P<revision>[^@]+))?")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_MEGABYTE = 10**6


@dataclass(frozen=True)
class Place:
    """A folder of a repository, or one file of it.

    Attributes:
        repo: org/name.
        folder: within it; "" for all of it.
        file: of that folder: a GGUF file, or one that lies beside weights; None: the whole folder.
        revision: a branch, a tag or a commit; None: the repository's main branch.
    """

    repo: str
    folder: str = ""
    revision: str | None = None
    file: str | None = None

    @classmethod
    def of(cls, path: str | Path) -> Self | None:
        """What a path says; None: it is one of this machine.

        Raises:
            CheckpointError: it begins with hf:// and is malformed.
        """
        begin = _BEGINS.match(str(path))
        if begin is None:
            return None
        rest = str(path)[begin.end() :]
        match = _FORM.fullmatch(rest)
        if match is None or {".", ".."} & {*match["repo"].split("/"), *match["folder"].split("/")}:
            raise CheckpointError(
                f"{shown(f'hf://{rest}')} names no folder of a repository: give hf://org/name, "
                "hf://org/name/sub/folder or hf://org/name@revision"
            )
        folder, _, last = match["folder"].strip("/").rpartition("/")
        if last in COMPANIONS or last.endswith(SUFFIX):
            return cls(match["repo"], folder, match["revision"], last)
        return cls(match["repo"], match["folder"].strip("/"), match["revision"])

    def __str__(self) -> str:
        inner = "".join(f"/{part}" for part in (self.folder, self.file) if part)
        return f"hf://{self.repo}{inner}" + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        """Of the folder, as one on a disk has it."""
        return (self.folder or self.repo).rpartition("/")[2]


def local_path(path: str | Path, *, weights: bool = True) -> Path:
    """Where the files of a checkpoint's folder lie: of one on the Hub in huggingface_hub's cache.

    A path that names a file is that file's. With a GGUF file comes all of its set, and what lies beside it.

    What is needed and not there is downloaded: the weights of the form that is read, and what lies beside them. However
    many processes of a host ask at once, each file is downloaded by one of them. A process that asks twice for a branch
    gets the same commit.

    Args:
        path: a path of this machine, which is returned as it is, or hf://org/name[/sub/folder][/file][@revision].
        weights: False leaves the weights of a folder out.

    Raises:
        CheckpointError: the path is malformed, there is no such folder or file, or no weights that are known.
        FileNotFoundError: no such repository or revision.
        OSError: it may not be read, the Hub cannot be reached, the download broke off, or the disk is full.
    """
    place = Place.of(path)
    return Path(path) if place is None else _downloaded(place, weights)


@functools.cache
def _downloaded(place: Place, weights: bool) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants

    with _explained(place):
        offline = constants.is_offline_mode()
        found = hub.HfApi().resolve_revision(place.repo, revision=place.revision, local_files_only=offline)
        commit = found.resolved
        sizes = _listed(place, commit)
        names = [name for name in sizes if "/" not in name]
        wanted = [name for name in sizes if name in COMPANIONS or _is_template(name)]
        if place.file is not None:
            if place.file not in names:
                raise CheckpointError(f"{place}: {place.repo} has no such file: check its name")
            files = set_of(place.file, names)
            return _fetched(place, commit, [*(wanted if files[0].endswith(SUFFIX) else ()), *files], sizes) / files[0]
        if weights:
            index = next((name for name in INDEX_NAMES if name in names), None)
            folder = _fetched(place, commit, [] if index is None else [index], sizes)
            chosen = _chosen(place, folder, names)
            wanted += [*([] if index is None else [index]), *(name for file in chosen.files for name in file)]
        return _fetched(place, commit, wanted, sizes)


def _chosen(place: Place, folder: Path, names: Sequence[str]) -> Found:
    """The weights that are read of a repository's folder, of which nothing but an index is there yet."""
    try:
        return choose_weights(folder, names, called=str(place))
    except CheckpointError as error:
        if not any(name.endswith(SUFFIX) for name in names):
            raise
        # There it is usual that one folder holds a model in many types.
        way = f"give one of them, hf://{place.repo}/{place.folder and place.folder + '/'}FILE{SUFFIX}"
        raise CheckpointError(f"{error}; {way}") from None


def _is_template(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder == MORE_TEMPLATES and file.endswith(".jinja")


def _listed(place: Place, commit: str) -> dict[str, int]:
    """The files below a folder of a repository, with their sizes.

    Raises:
        CheckpointError: there are none.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        entries: Iterable[Any] = hub.get_cached_repo_tree(place.repo, revision=commit)
        found = {entry.path: entry.size for entry in entries}
    except errors.CachedRepoTreeNotFoundError:
        try:
            entries = hub.HfApi().list_repo_tree(place.repo, recursive=True, revision=commit)
            found = {entry.path: entry.size for entry in entries if isinstance(entry, hub.RepoFile)}
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
                raise
            # Earlier versions of the library kept no list.
            here = Path(hub.snapshot_download(place.repo, revision=commit, local_files_only=True))
            found = {str(file.relative_to(here)): file.stat().st_size for file in here.rglob("*") if file.is_file()}
    begin = f"{place.folder}/" if place.folder else ""
    sizes = {name.removeprefix(begin): size for name, size in found.items() if name.startswith(begin)}
    if not sizes:
        folders = sorted({name.rpartition("/")[0] for name in found} - {""})
        known = f"it has {shown(', '.join(folders))}" if folders else "it has none"
        raise CheckpointError(f"{place}: {place.repo} has no folder {place.folder or 'with files'}: {known}")
    return sizes


def _fetched(place: Place, commit: str, names: Sequence[str], sizes: Mapping[str, int]) -> Path:
    """Download files, but those that are there; returns the folder in which they lie."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    folder = cache / repo_folder_name(repo_id=place.repo, repo_type="model") / "snapshots" / commit / place.folder
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        _see_that_it_answers(place, commit)
        count = sum(sizes[name] for name in missing)
        speaks = _speaks()
        if speaks:
            _warn_of_room(place, count, cache)
        bars = speaks and sys.stderr.isatty()  # the library's own
        work = f"downloading {place}"
        with showing(work, -(-count // _MEGABYTE), unit="MB", shown=speaks and not bars) as downloading:
            paths = [glob.escape(f"{place.folder}/{name}".lstrip("/")) for name in missing]
            _download(place.repo, commit, paths, downloading, bars=bars)
    return folder


def _see_that_it_answers(place: Place, commit: str) -> None:
    """Ask the Hub for a commit, of which something is missing here: whoever downloads tries for long to reach it.

    Raises:
        LocalEntryNotFoundError, HfHubHTTPError: it cannot be reached; it refuses.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        hub.HfApi().model_info(place.repo, revision=commit)
    except errors.HfHubHTTPError:
        raise
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise errors.LocalEntryNotFoundError(f"{place} is not whole in the cache") from error


def _speaks() -> bool:
    """Whether this process shows how far its host is."""
    with suppress(ValueError):  # said where the ranks are joined
        return Launch.find().local_rank == 0
    return True


def _warn_of_room(place: Place, count: int, cache: Path) -> None:
    """Say where files might not fit; another revision may have brought some of them, so that it is no error yet."""
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if count > free:
        logger.warning(
            "%s: %s are to be downloaded, and %s has %s free: HF_HOME=FOLDER names another place",
            *(place, shown_bytes(count), cache, shown_bytes(free)),
        )


def _download(repo: str, commit: str, patterns: list[str], progress: Progress, *, bars: bool) -> None:
    """Bring files into the cache.

    Args:
        progress: of the bytes, where the library does not draw its ``bars``.
    """
    import huggingface_hub as hub
    from huggingface_hub.utils import tqdm

    left = threading.Event()
    lock = threading.Lock()
    done = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str | None = None, **settings: Any) -> None:
            # Of its bars one counts bytes as they are written.
            self._counts = name == "huggingface_hub.snapshot_download"
            super().__init__(*args, name=name, **(settings if bars else {**settings, "disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            if left.is_set():
                raise InterruptedError("nobody waits for the download any more")
            if self._counts:
                with lock:
                    before, done = done, done + int(n or 0)
                    progress.advance(done // _MEGABYTE - before // _MEGABYTE)
            return super().update(n)

    # Its threads do not hear of Ctrl-C, and it waits for all files that they have begun.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(
                hub.snapshot_download, repo, revision=commit, allow_patterns=patterns, tqdm_class=Bar
            ).result()
        finally:
            left.set()


@contextmanager
def _explained(place: Place) -> Iterator[None]:
    """Meanwhile an error of the library becomes one line that names the path and says what to do."""
    try:
        yield
    except Exception as error:
        explained = _explanation(place, error)
        if explained is error:
            raise
        raise explained from error


def _explanation(place: Place, error: Exception) -> Exception:
    from huggingface_hub import constants, errors

    if isinstance(error, CheckpointError):
        return error
    answer = next((one for one in _causes(error) if isinstance(one, errors.HfHubHTTPError)), None)
    status = None if answer is None else answer.response.status_code
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{place} names no repository: {first_line(str(error), otherwise='check the path')}")
    if isinstance(answer, errors.RevisionNotFoundError):
        revision = place.revision or constants.DEFAULT_REVISION
        return FileNotFoundError(
            f"{place}: {place.repo} has no revision {revision}: give a branch, a tag or a whole commit"
        )
    if isinstance(answer, errors.GatedRepoError):
        return OSError(f"{place} is gated: ask for access at {constants.ENDPOINT}/{place.repo}, and {_LOGIN}")
    if status in (401, 403):
        return OSError(f"{place} is not there, or not for everyone ({status}): check the name, or {_LOGIN}")
    if status == 404:
        return FileNotFoundError(f"{place} does not exist: check the name; of a private one, {_LOGIN}")
    if status is not None:
        return OSError(f"{place} cannot be downloaded: {constants.ENDPOINT} answers {status}; try again later")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        reason = f"{error.strerror}: {place} finds no place here, free some or name another one by HF_HOME=FOLDER"
        return OSError(error.errno, reason, str(error.filename or constants.HF_HUB_CACHE))
    return _unreachable(place, error)


def _unreachable(place: Place, error: Exception) -> Exception:
    """Neither the Hub nor the cache has it, or the download broke off."""
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        return OSError(
            f"{place} is not whole in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, or fill the cache "
            f"where there is a network"
        )
    first = _causes(error)[-1]
    reason = f"{type(first).__name__}: {first_line(str(first), otherwise='no reason given')}"
    if isinstance(error, errors.RevisionResolutionError | errors.LocalEntryNotFoundError):
        return OSError(
            f"{place} is not whole in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached ({reason}): "
            "check the network"
        )
    return OSError(f"the download of {place} broke off ({reason}): start again, files that are whole stay")


def _causes(error: BaseException) -> list[BaseException]:
    """An error, what it came from, and so on."""
    found = [error]
    while (before := found[-1].__cause__) is not None and before not in found:
        found.append(before)
    return found
