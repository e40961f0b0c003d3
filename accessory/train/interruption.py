"""Asking a run to stop: by a signal, or because its launcher is gone."""

import contextlib
import enum
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from accessory.launch.launcher import Launch
from accessory.launch.parent import LOOK_EVERY, Parent

logger = logging.getLogger(__name__)

# A rank whose launcher is gone gets so many seconds to end its step or export. That a peer is gone too shows itself.
_GRACE = 600.0
# Before they leave at once the other ranks wait so long: rank 0 gets the same signal, and speaks for all.
_RANK_0_SPEAKS = 1.0
_TOGETHER = 0.01
_CTRL_C = 128 + signal.SIGINT


class Stop(enum.IntEnum):
    """Why a run stops before its end; the larger rules where ranks differ."""

    NO = 0
    SIGNAL = 1
    CTRL_C = 2
    LAUNCHER_GONE = 3

    @property
    def exit_code(self) -> int:
        return {Stop.CTRL_C: _CTRL_C, Stop.LAUNCHER_GONE: 1}.get(self, 0)

    @property
    def reason(self) -> str:
        return {Stop.SIGNAL: "a signal", Stop.CTRL_C: "Ctrl-C"}.get(self, "the launcher is gone")

    def describe(self, done: int, end: int, saved: Path | None) -> str:
        """What a run says last that stops after ``done`` of ``end`` steps, with its state ``saved``."""
        left = "the model is still to be written" if done == end else f"{end - done} steps are left"
        return f"stopped after step {done} ({self.reason}), {left}: saved as {saved}, go on with --auto_resume"


_STOPS = {
    signal.SIGINT: Stop.CTRL_C,
    signal.SIGTERM: Stop.SIGNAL,
    signal.SIGUSR1: Stop.SIGNAL,
    signal.SIGHUP: Stop.SIGNAL,  # the terminal was closed
}
# What a terminal sends: a shell has its background jobs ignore the one, and nohup the other.
_OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)


class Interruption:
    """While entered the launcher is watched, and signals ask for a stop, or end the process at once.

    From `begin` on SIGTERM, SIGUSR1, SIGHUP and the first SIGINT ask for a stop. After a SIGINT another one, or a
    SIGTERM, ends the process at once: torchrun makes that of the second Ctrl-C. Before the first step there is nothing
    to save: the first SIGINT ends the process, and the other signals act as ever.

    At once is when the signal comes. Python's own handlers wait for the main thread, which may be in a collective for
    an hour; so a thread reads the signals, from the file descriptor that Python's handlers in C write to.

    torchrun dies of SIGUSR1 and of kill -9 without ending its workers, which would go on unseen and hold their
    devices. So a rank whose parent is another than at the start asks for a stop too, and ends by itself if the run
    does not come to it; before the first step at once. Enter it in the main thread, and early: a launcher that is gone
    by then is never missed.

    Attributes:
        saves: set while a last checkpoint is written; the process is then left to end it.
        leaves: set when the process is about to end at once: that others end as well is no news then.
        at_the_end: is called then, before `begin`.
    """

    def __init__(self, launch: Launch) -> None:
        self._asked = [Stop.NO]  # to which both threads append
        self.saves, self.leaves = False, threading.Event()
        self.at_the_end: Callable[[], None] = lambda: None
        self._launch, self._parent = launch, Parent(launch)
        self._saved: Callable[[], Path | None] | None = None
        self._interrupted, self._beginning = False, threading.Lock()
        self._over = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="interruption", daemon=True)

    def __enter__(self) -> Self:
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._others = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._handle(signal.SIGINT)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._others)
        with contextlib.suppress(BlockingIOError):  # then it has enough to read
            os.write(self._writes, b"\0")
        self._thread.join()
        os.close(self._reads)
        os.close(self._writes)

    @property
    def asked(self) -> Stop:
        """Why this rank should stop; the training loop looks at it after every step."""
        return max(self._asked)

    def begin(self, saved: Callable[[], Path | None]) -> None:
        """From now on there are steps to save.

        Args:
            saved: finds the last training state that is complete.
        """
        # A process that is about to end, since nothing is to be saved, comes no further.
        with self._beginning:
            self._saved = saved
            self.at_the_end = lambda: None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            self._handle(number)

    def _handle(self, number: signal.Signals) -> None:
        if number in _OF_TERMINALS and signal.getsignal(number) is signal.SIG_IGN:
            return
        self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(_STOPS[signal.Signals(number)])

    def _watch(self) -> None:
        end: float | None = None
        while not self._over.is_set():
            ready, _, _ = select.select([self._reads], [], [], LOOK_EVERY)
            if ready:
                # Those that came while the process was held are handled in any order: SIGINT first.
                self._over.wait(_TOGETHER)
                for number in sorted(os.read(self._reads, 64)):
                    self._take(number)
            if end is None and self._parent.is_gone:
                self._asked.append(Stop.LAUNCHER_GONE)
                end = time.monotonic() + (0.0 if self._saved is None else _GRACE)
            if end is not None and time.monotonic() > end and not (self.saves or self._over.is_set()):
                logger.error("the launcher is gone: leaving")
                with self._beginning:
                    self.at_the_end()
                    os._exit(Stop.LAUNCHER_GONE.exit_code)

    def _take(self, number: int) -> None:
        """What a signal means beside the wish to stop, which may have been noted already."""
        if number not in _STOPS:
            return
        self._asked.append(_STOPS[signal.Signals(number)])
        if number == signal.SIGINT:
            with self._beginning:
                if self._saved is None:
                    self._leave("ended before the first step (Ctrl-C): there was nothing to save")
        if number in (signal.SIGINT, signal.SIGTERM) and self._interrupted:
            last = None if self._saved is None else self._saved()
            state = "no training state was saved" if last is None else f"the last one saved is {last}"
            self._leave(f"ended at once (Ctrl-C): {state}" + ("" if last is None else "; go on with --auto_resume"))
        elif number == signal.SIGINT:
            self._interrupted = True
            if self._launch.rank == 0:
                logger.info("Ctrl-C: ending the step and saving it; another Ctrl-C ends at once, without")

    def _leave(self, message: str) -> None:
        """End the process, wherever its main thread is; what it was writing has no name yet."""
        self.leaves.set()
        if self._launch.rank == 0:
            logger.warning("%s", message)
        elif self._over.wait(_RANK_0_SPEAKS):
            return
        self.at_the_end()
        os._exit(_CTRL_C)
