"""How PyTorch's threads on the processor wait for one another, beside other programs that want its cores.

OpenMP's threads meet at the end of every product. GNU's, which PyTorch has on Linux, spin for some milliseconds until
the last is there. Where another program has been given the core of one of them, all others spin away until that has it
back, and a training step takes several times as long; letting them sleep at once would cost a fifth where nobody else
wants the cores. So the model asks here, step by step, how long its threads wait for a core, and has them sleep soon
where that is much. Their number stays, and with it every bit of what they compute.
"""

import atexit
import functools
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from accessory.launch.threads import COUNT, SHARED, share_of

# Seconds between two looks, and until spinning is tried again; each try that fails doubles the second, to a limit.
_LOOK, _TRY, _LONGEST = 0.5, 5.0, 60.0
# Seconds of each second that the threads wait for a core, added up: at most 0.05 where nobody else computes, 0.18 where
# the driver of an engine has a process of its own, 0.8 beside another program (2 threads on 2 cores, Linux 6.18).
_LONG = 0.4
# More threads than this, and more teams that idle, there are not to be.
_MOST = 16
# Linux says of each thread how long it has run and, behind that, has waited to; in nanoseconds.
_THREADS = Path("/proc/self/task")
# Who has set one of them has decided.
_DECIDED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Elements of a tensor that PyTorch adds up with all threads.
_LARGE = 1 << 20


class Waiting:
    """Whether threads spin or sleep while they wait for others.

    Args:
        sleep: have them sleep soon, or spin again.
        waited: seconds that the threads of this process have waited for a core so far, added up.
        clock: seconds.

    Attributes:
        sleeps: whether they sleep soon.
    """

    def __init__(
        self,
        *,
        sleep: Callable[[bool], None],
        waited: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sleeps = False
        self._sleep, self._waited, self._clock = sleep, waited, clock
        self._looked, self._seen = clock(), waited()
        self._since, self._patience = self._looked, _TRY

    def adapt(self) -> None:
        """Change the way of waiting where others came or went, if it is time to look; between two steps of a model."""
        now = self._clock()
        if now - self._looked < _LOOK:
            return
        seen = self._waited()
        share = (seen - self._seen) / (now - self._looked)
        self._looked, self._seen = now, seen
        if not self.sleeps and share > _LONG:
            failed = now - self._since < _TRY
            self._patience = min(2 * self._patience, _LONGEST) if failed else _TRY
            self._become(True, now)
        elif self.sleeps and now - self._since >= self._patience:
            self._become(False, now)

    def _become(self, sleeps: bool, now: float) -> None:
        self.sleeps, self._since = sleeps, now
        self._sleep(sleeps)


class _Crowd:
    """More threads of OpenMP than there are cores, which do nothing.

    Where it has that many, GNU's lets all threads sleep after 100 turns of spinning, in place of 300,000 (its manual
    under GOMP_SPINCOUNT, https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).
    """

    def __init__(self) -> None:
        self._left, self._idlers = threading.Event(), list[threading.Thread]()
        # A Python that shuts down aborts where one of them is still there.
        atexit.register(self, False)

    def __call__(self, there: bool) -> None:
        self._left.set()
        for idler in self._idlers:
            idler.join()
        self._left, self._idlers = threading.Event(), []
        if there:
            for _ in range(self.teams(torch.get_num_threads())):
                self._idlers.append(threading.Thread(target=self._idle, args=(self._left,), daemon=True))
                self._idlers[-1].start()

    @staticmethod
    def teams(threads: int) -> int:
        """How many are more than the cores; each Python thread that computes has its own, of which it is one itself."""
        return 1 + share_of(1) // max(1, threads - 1)

    @staticmethod
    def _idle(left: threading.Event) -> None:
        torch.ones(_LARGE).sum()
        left.wait()


def adapt_waiting() -> None:
    """`Waiting.adapt` for this process, unless its user has said how threads wait or how many there are to be."""
    if not torch.compiler.is_compiling() and (waiting := _of_process()) is not None:
        waiting.adapt()


@functools.cache
def _of_process() -> Waiting | None:
    decided = (COUNT in os.environ and SHARED not in os.environ) or any(name in os.environ for name in _DECIDED)
    threads = torch.get_num_threads()
    few = 1 < threads <= _MOST and _Crowd.teams(threads) <= _MOST
    known = (_THREADS / str(os.getpid()) / "schedstat").exists()
    return Waiting(sleep=_Crowd(), waited=_waited) if few and known and not decided else None


def _waited() -> float:
    total = 0
    for thread in _THREADS.iterdir():
        with suppress(OSError):  # it has ended meanwhile
            total += int((thread / "schedstat").read_text().split()[1])
    return total / 1e9
