"""A training that goes on where it was stopped: what it has reached lies beside the folder that it will write."""

import logging
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

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
        stop: who asks it to.
    """

    def __init__(self, folder: Path, stop: "StopSignals") -> None:
        self.folder, self.kept, self.stop = folder, 0, stop
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
        return self.stop.asked is not None or time.monotonic() - self._saved_at >= SAVE_EVERY

    def save(self, recipe: Mapping[str, Any], step: int, state: Mapping[str, Any]) -> None:
        """Keep the state after so many steps in place of the last one. OSError where the disk is full."""
        with replacing(self.folder / _STATE) as aside:
            torch.save({"recipe": dict(recipe), "step": step, "state": dict(state)}, aside)
        self.kept, self._saved_at = step, time.monotonic()


class StopSignals:
    """While entered, Ctrl-C (SIGINT) and SIGTERM end the process by an exception, so that it cleans up.

    Within `steps` the first of them only asks for a stop, to be noticed at the step's end; a second one ends it at
    once. Other threads than the main one get no signals, and what this process was told to ignore stays ignored.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._waits = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for its background jobs
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """While the work consists of steps that can be saved; ends as asked, once the last of them is."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self.asked is not None:
            raise _end_by(self.asked)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._waits or self.asked is not None:
            raise _end_by(signal.Signals(number))
        self.asked = signal.Signals(number)
        name = "Ctrl-C" if number == signal.SIGINT else self.asked.name
        logger.info("%s: ending the step and saving it; another one ends at once", name)


def _end_by(number: signal.Signals) -> BaseException:
    """What ends a program as a shell has it of one that a signal ended: with the exit code 128 + its number."""
    return KeyboardInterrupt("the step is kept") if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def unfinished(path: Path) -> Iterator[Unfinished]:
    """Hold what has been reached of a training that will write `path`; it goes when the training is done.

    It also goes with a training that fails, and with one that was stopped before anything was kept. Signals are
    `StopSignals`'s meanwhile.

    Raises:
        BlockingIOError: another process is at the same training.
    """
    folder = path.with_name(f".{path.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / "lock", patience=0):
            for leftover in folder.glob("*.tmp"):  # of a process that was killed while it saved
                leftover.unlink()
            progress = Unfinished(folder, stop := StopSignals())
            try:
                with stop:
                    yield progress
            except BaseException as error:
                if not progress.exists or isinstance(error, ValueError | FloatingPointError):
                    shutil.rmtree(folder, ignore_errors=True)
                elif isinstance(error, KeyboardInterrupt | SystemExit):
                    where = f"step {progress.kept}" if progress.kept else "the last step that was kept"
                    logger.warning("stopped: the same command goes on behind %s", where)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except TimeoutError:
        raise BlockingIOError(
            f"{path} is being made by another process: wait for it, or choose another destination"
        ) from None
