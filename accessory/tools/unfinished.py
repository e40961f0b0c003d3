"""A training that goes on where it was stopped: what it has reached lies beside the folder that it will write."""

import logging
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from accessory.files import locked, replacing

logger = logging.getLogger(__name__)

# Seconds between two states. One of the tiny model is 59 MB.
SAVE_EVERY = 30.0
_STATE = "state.pt"


class Unfinished:
    """What a training has reached, on disk.

    Args:
        folder: to keep it in; it exists, and its lock is held.

    Attributes:
        kept: steps of the last state; 0 where there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, 0
        self._saved_at = time.monotonic()

    def load(self, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state of a training of the same recipe; None, and none is kept any more, where there is none."""
        path = self.folder / _STATE
        if not self.exists:
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            theirs, step, state = saved["recipe"], int(saved["step"]), dict(saved["state"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            logger.warning("%s cannot be read (%s): the training begins anew", path, error)
        else:
            differs = sorted(key for key in {*theirs, *recipe} if theirs.get(key) != recipe.get(key))
            if not differs:
                self.kept = step
                return state
            logger.warning("an earlier training was stopped that had other %s: this begins anew", ", ".join(differs))
        path.unlink()
        return None

    @property
    def exists(self) -> bool:
        """Whether a state is kept, be it of an earlier run."""
        return (self.folder / _STATE).exists()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved_at >= SAVE_EVERY

    def save(self, recipe: Mapping[str, Any], step: int, state: Mapping[str, Any]) -> None:
        """Keep the state after so many steps in place of the last one. OSError where the disk is full."""
        with replacing(self.folder / _STATE) as aside:
            torch.save({"recipe": dict(recipe), "step": step, "state": dict(state)}, aside)
        self.kept, self._saved_at = step, time.monotonic()


@contextmanager
def unfinished(path: Path) -> Iterator[Unfinished]:
    """Hold what has been reached of a training that will write `path`; it goes when the training is done.

    It also goes with a training that fails, and with one that was stopped before anything was kept.

    Raises:
        BlockingIOError: another process is at the same training.
    """
    folder = path.with_name(f".{path.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / "lock", patience=0):
            for leftover in folder.glob("*.tmp"):  # of a process that was killed while it saved
                leftover.unlink()
            progress = Unfinished(folder)
            try:
                yield progress
            except BaseException as error:
                if not progress.exists or isinstance(error, ValueError | FloatingPointError):
                    shutil.rmtree(folder, ignore_errors=True)
                elif isinstance(error, KeyboardInterrupt):
                    where = f"step {progress.kept}" if progress.kept else "the last step that was kept"
                    logger.warning("stopped: the same command goes on behind %s", where)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except TimeoutError:
        raise BlockingIOError(
            f"{path} is being made by another process: wait for it, or choose another destination"
        ) from None
