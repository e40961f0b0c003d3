"""Asking a run to stop: by a signal, or because its launcher is gone."""

import enum
import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from accessory.launch.launcher import Launch

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_EVERY = 0.5
# A rank whose launcher is gone gets so many seconds to end its step or export. That a peer is gone too shows itself.
_GRACE = 600.0


class Stop(enum.IntEnum):
    """Why a run stops before its end; the larger rules where ranks differ."""

    NO = 0
    SIGNAL = 1
    LAUNCHER_GONE = 2


class Interruption:
    """While entered the launcher is watched, and from `begin` on SIGTERM and SIGUSR1 ask for a stop.

    torchrun dies of SIGUSR1 and of kill -9 without ending its workers, which would go on unseen and hold their
    devices. So a rank whose parent is another than at the start asks for a stop too, and ends by itself if the run
    does not come to it. Before the first step there is nothing to save: signals then act as ever, even on a process
    that waits for others, and a rank without launcher leaves at once. Enter it in the main thread, and early: a
    launcher that is gone by then is never missed.

    Attributes:
        asked: why this rank should stop; the training loop looks at it after every step.
        saves: set while a last checkpoint is written; the process is then left to end it.
    """

    def __init__(self, launch: Launch) -> None:
        self.asked = Stop.NO
        self.saves = False
        self._began = False
        self._launch, self._parent = launch, os.getppid()
        self._over = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Whoever started a process alone may leave it behind on purpose.
        if self._launch.launcher != "alone":
            threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From now on there are steps to save."""
        self._began = True
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = max(self.asked, Stop.SIGNAL)

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            if self._over.wait(_LOOK_EVERY):
                return
        self.asked = Stop.LAUNCHER_GONE
        end = time.monotonic() + (_GRACE if self._began else 0.0)
        while time.monotonic() < end or self.saves:
            if self._over.wait(_LOOK_EVERY):
                return
        logger.error("the launcher is gone: leaving")
        os._exit(1)
