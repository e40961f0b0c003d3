"""Asking a run to stop: by a signal, or because its launcher is gone."""

import enum
import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from accessory.launch import Launch

logger = logging.getLogger(__name__)

_LOOK_EVERY = 0.5
# A rank whose launcher is gone gets so many seconds to end its step; a peer may be gone too.
_GRACE = 60.0


class Stop(enum.IntEnum):
    """Why a run stops before its end; the larger rules where ranks differ."""

    NO = 0
    SIGNAL = 1
    LAUNCHER_GONE = 2


class Interruption:
    """While entered and ``stepping``, SIGTERM and SIGUSR1 ask for a stop; and the launcher is watched.

    torchrun dies of SIGUSR1 and of kill -9 without ending its workers, which would go on unseen and hold their
    devices. So a rank whose parent is another than at the start asks for a stop too, and ends by itself if the run
    does not come to it. Before the first step there is nothing to save: signals then act as ever, and a rank without
    launcher leaves at once.

    Attributes:
        asked: why this rank should stop.
        stepping: set by the training loop, which looks at ``asked`` after every step.
        saves: set while a last checkpoint is written; the process is then left to end it.
    """

    def __init__(self, launch: Launch) -> None:
        self.asked = Stop.NO
        self.stepping = False
        self.saves = False
        self._launch, self._parent = launch, os.getppid()
        self._over = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._on_signal)
        # Whoever started a process alone may leave it behind on purpose.
        if self._launch.launcher != "alone":
            threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.stepping:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = max(self.asked, Stop.SIGNAL)

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            if self._over.wait(_LOOK_EVERY):
                return
        self.asked = Stop.LAUNCHER_GONE
        end = time.monotonic() + (_GRACE if self.stepping else 0.0)
        while time.monotonic() < end or self.saves:
            if self._over.wait(_LOOK_EVERY):
                return
        logger.error("the launcher is gone: leaving")
        os._exit(1)
