"""Noticing that the launcher of this process is gone: no launcher ends its ranks when it gets a kill -9."""

import logging
import os
import threading

from accessory.launch.launcher import Launch

logger = logging.getLogger(__name__)

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


def leave_with_launcher(launch: Launch) -> None:
    """End this process, one of several ranks, soon after its launcher; for a program that has nothing to save."""
    if launch.world_size > 1:
        watch = threading.Thread(target=_watch, args=(Parent(launch), launch), name="launcher watch", daemon=True)
        watch.start()


def _watch(parent: Parent, launch: Launch) -> None:
    look = threading.Event()  # nobody sets it
    while not parent.is_gone:
        look.wait(LOOK_EVERY)
    if launch.local_rank == 0:
        logger.error("the launcher is gone: leaving")
    os._exit(1)
