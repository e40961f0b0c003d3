"""Noticing that the launcher of this process is gone: no launcher ends its ranks when it gets a kill -9."""

import os

from accessory.launch.launcher import Launch

LOOK_EVERY = 0.5  # seconds


class Parent:
    """The process that started this one; make it early, since one that is gone by then is not missed.

    A rank that a command of ours started knows its launcher, and misses it at any time. Whoever starts a process alone
    may leave it behind on purpose: that one has no launcher.
    """

    def __init__(self, launch: Launch) -> None:
        self._process = None if launch.launcher == "alone" else launch.parent or os.getppid()

    @property
    def is_gone(self) -> bool:
        return self._process is not None and os.getppid() != self._process
