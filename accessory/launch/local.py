"""Ranks of the same command on this host, started by the command itself: what ``--nproc N`` does.

The launcher computes nothing. It starts the ranks, each in a session of its own, so that a signal of the terminal
reaches the launcher alone, passes on what it gets, and ends when all ranks have ended. A rank knows its launcher by a
variable and ends soon after it, however that has died (`launch.parent`).
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import FrameType

from accessory.launch.launcher import PARENT_VARIABLE, Launch
from accessory.launch.placement import Placement, environments

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LOOK_EVERY = 0.05
# Ranks whose peer is dead end by themselves within 11 s; those that do not are ended.
_PATIENCE = 15.0


def run_on_ranks(nproc: int, arguments: Sequence[str], *, device: str | None = None) -> int:
    """Run ``accessory ARGUMENTS`` on ``nproc`` ranks of this host, and wait for their end; returns the exit code.

    For the main thread. The ranks get the variables of torchrun; rank 0 has this process's standard input and output,
    all have its standard error. SIGINT, SIGTERM, SIGUSR1 and SIGHUP go on to every rank, once for each that comes;
    from then on the ranks have all the time that they want, since they may be saving. Otherwise ranks that outlive a
    failed one are ended after 15 s.

    Args:
        arguments: with ``--nproc`` among them: a rank knows that it is one, and starts no others.
        device: as the ranks are told: where each has no GPU of its own they share the CPU's cores.

    Returns:
        0, or the exit code of the rank that failed first, 128 + N for a signal N. What failed has been said: by the
        ranks, or here where a signal that nobody asked for has ended one.

    Raises:
        ValueError: the device is not there for all of them.
        OSError: the ranks cannot be started.
    """
    # The store is held until the ranks have ended: it is where they meet.
    store, own = environments(Placement.of(nproc, None, device=device))
    received: deque[int] = deque()
    # Without -P a folder of the user's could hide one of Python's modules.
    command = [sys.executable, "-P", "-m", "accessory", *arguments]
    with _noting(received), Ranks(command, own) as ranks:
        code = ranks.wait(received)
    del store
    return code


def starts_ranks(nproc: int) -> bool:
    """Whether this process should start ``nproc`` ranks: not for one, and not where it is one of them.

    Raises:
        ValueError: it is one of several that another launcher has started, which must all refuse.
    """
    launch = Launch.find()
    if nproc == 1 or launch.parent is not None:
        return False
    if launch.has_others:
        raise ValueError(
            f"--nproc {nproc} starts ranks itself, and {launch.launcher.replace('slurm', 'srun')} has started "
            f"{launch.world_size} already: give only one of the two"
        )
    return True


class Ranks:
    """Processes of one command, one for each environment, and how they end; left, none of them is there."""

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._size, self._failed, self._passed_on = len(environments), list[int](), set[int]()
        try:
            for rank, environment in enumerate(environments):
                self._running[rank] = subprocess.Popen(
                    command,
                    env=environment | {PARENT_VARIABLE: str(os.getpid())},
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    stdout=None if rank == 0 else 2,
                    start_new_session=True,
                )
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()

    def wait(self, received: deque[int]) -> int:
        """Until all have ended; passes on what is ``received`` meanwhile; returns the exit code."""
        end: float | None = None
        while self._running:
            while received:
                self._pass_on(received.popleft())
                if received:  # of two that wait to be taken a process sees one, and another rank perhaps both
                    time.sleep(_LOOK_EVERY)
            self._look()
            if self._failed and not self._passed_on:
                end = end or time.monotonic() + _PATIENCE
                if time.monotonic() > end:
                    logger.info("ending the ranks that have not ended after another: %s", [*self._running])
                    self._kill()
            if self._running:
                time.sleep(_LOOK_EVERY)
        return self._code()

    def _code(self) -> int:
        failed = [code if code > 0 else 128 - code for code in self._failed]
        # Who ended by what was asked for speaks for all: another may have failed only since that one was gone.
        asked = [code for code in failed if code - 128 in self._passed_on]
        # With 1 a rank may end sooner than the one that it has lost, whose code is its own: generate's where `head`
        # has read enough.
        own = [code for code in self._failed if code > 1] if failed[:1] == [1] else []
        return (asked or own or failed or [0])[0]

    def _pass_on(self, number: int) -> None:
        self._passed_on.add(number)
        for process in self._running.values():
            process.send_signal(number)

    def _look(self) -> None:
        """See who has ended since the last look."""
        codes = {rank: process.poll() for rank, process in self._running.items()}
        ended = [(code, rank) for rank, code in codes.items() if code is not None]
        # One that a signal has ended comes first: of two that end together the other follows it, mostly with 1.
        for code, rank in sorted(ended, key=lambda one: (one[0] >= 0, one[0] == 1, one[1])):
            del self._running[rank]
            if code < 0 and -code not in self._passed_on and not self._failed:
                logger.error("rank %d of %d was ended by %s: the others end too", rank, self._size, _name(-code))
            elif code == -signal.SIGINT and rank == 0:  # before it could say so itself
                logger.warning("interrupted (Ctrl-C)")
            if code != 0:
                self._failed.append(code)

    def _kill(self) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running = {}


@contextlib.contextmanager
def _noting(received: deque[int]) -> Iterator[None]:
    """Note the signals that come, instead of ending by them; what was ignored stays so."""

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
