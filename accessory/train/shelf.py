"""The folders of a run: written aside, published whole, and the newest of them named."""

import logging
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from accessory.config import read_json
from accessory.errors import CheckpointError
from accessory.files import replacing, sync

logger = logging.getLogger(__name__)

_HIDDEN = re.compile(r"\..+\.tmp-[0-9a-f]{8}")


@dataclass(frozen=True)
class Shelf:
    """Folders of a run, each written aside and renamed when complete, and a file ``latest`` that names one of them.

    A complete folder holds INDEX, whose "files" gives the length of every file; other folders are left alone.
    """

    folder: Path

    CHECKPOINTS = "checkpoints"
    INDEX = "state.json"
    LATEST = "latest"
    BEGUN = ".begun"

    @property
    def is_begun(self) -> bool:
        """Whether a run has begun here and was ended before its first folder was published."""
        return (self.folder / self.BEGUN).exists()

    def begin(self) -> None:
        """Note that a run begins here anew."""
        (self.folder / self.BEGUN).touch()

    def aside(self, name: str) -> tuple[Path, Path]:
        """Make a folder to write to; returns it and the free name to `publish` it under.

        A name that is taken gets a number behind it, since replacing a folder is not one step.
        """
        final, number = self.folder / name, 0
        while final.exists():
            number += 1
            final = self.folder / f"{name}.{number}"
        aside = self._hidden(final.name)
        aside.mkdir(parents=True)
        return aside, final

    def publish(self, aside: Path, final: Path, *, keep_last: int | None = None) -> None:
        """Rename a written folder, then move ``latest`` to it, then remove all but the newest ``keep_last``.

        What a user has renamed stays: only names that begin as this one does (up to a dash) are removed.
        """
        sync(aside)
        aside.rename(final)
        sync(self.folder)
        with replacing(self.folder / self.LATEST) as pointer:
            pointer.write_text(final.name + "\n", encoding="utf-8")
        (self.folder / self.BEGUN).unlink(missing_ok=True)
        if keep_last is not None:
            kind = final.name.partition("-")[0] + "-"
            others = [path for path in self._by_age() if path != final and path.name.startswith(kind)]
            for path in others[keep_last - 1 :]:
                # Renamed first: a removal that is cut short leaves nothing that looks complete, and is taken up again.
                path.rename(self._hidden(path.name))
        for path in self.half_written():
            shutil.rmtree(path, ignore_errors=True)

    def named(self) -> Path | None:
        """The folder that ``latest`` names, whatever has become of it since."""
        try:
            return self.folder / (self.folder / self.LATEST).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def latest(self) -> Path | None:
        """The folder that ``latest`` names, else the newest complete one; warns of what it passes over."""
        for path in self.half_written():
            logger.warning("ignoring %s: its writing was cut short, or its removal", path)
        named = self.named()
        if named is not None:
            reason = self.incomplete(named)
            if not reason:
                return named
            logger.warning("ignoring %s, which %s names: %s", named, self.folder / self.LATEST, reason)
        for path in self._by_age():
            reason = self.incomplete(path)
            if not reason:
                return path
            logger.warning("ignoring %s: %s", path, reason)
        return None

    def half_written(self) -> list[Path]:
        """The folders whose writing or removal is under way, or was cut short."""
        found = (path for path in self.folder.glob(".*.tmp-*") if _HIDDEN.fullmatch(path.name))
        return sorted(path for path in found if path.is_dir() and not path.is_symlink())

    @classmethod
    def locate(cls, path: Path) -> Path:
        """The checkpoint that ``path`` is, or the last one within it or its folder CHECKPOINTS.

        Raises:
            CheckpointError: there is none.
        """
        if (path / cls.INDEX).exists():
            return path
        for folder in (path, path / cls.CHECKPOINTS):
            found = cls(folder).latest() if folder.is_dir() else None
            if found is not None:
                return found
        raise CheckpointError(f"{path} holds no training state: name a run's output_dir or a folder of its checkpoints")

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

    def _hidden(self, name: str) -> Path:
        return self.folder / f".{name}.tmp-{uuid.uuid4().hex[:8]}"

    def _by_age(self) -> list[Path]:
        """The folders with an index, newest first."""
        indices = sorted(self.folder.glob(f"[!.]*/{self.INDEX}"), key=lambda path: path.stat().st_mtime_ns)
        return [index.parent for index in reversed(indices)]
