"""The rank processes of a driver: started with a connection to each, watched, and ended."""

import contextlib
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import torch.distributed as dist

from accessory.errors import first_line
from accessory.launch.placement import Placement, environments
from accessory.serve.messages import Failed, Link, Ready, Setup
from accessory.serve.request import RankLost

# Seconds for ranks that were told to end to do so by themselves.
_PATIENCE = 3.0
# Seconds in which the cause of a loss shows: the rank that died first and those that follow it end almost together.
_CAUSE = 0.5


class RankProcesses:
    """Processes that hold a model together, children of this one.

    They end with this process, however it ends: each watches its connection.

    Attributes:
        links: a connection to each, by rank.
        over: whether their end has been seen to.
    """

    def __init__(self, placement: Placement) -> None:
        self.size = placement.size
        self.links: list[Link] = []
        self.over = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._store: dist.Store | None
        self._store, own = environments(placement)
        try:
            for environment in own:
                self._start(environment)
        except BaseException:
            self.kill()
            raise

    def load(self, setup: Setup) -> Ready:
        """Let the ranks load the model; returns when it is there.

        Raises:
            Exception: what was raised in loading, on all ranks alike.
            RankLost: a rank ended.
        """
        try:
            for link in self.links:
                link.send(setup)
            with selectors.DefaultSelector() as selector:
                for link in self.links:
                    selector.register(link, selectors.EVENT_READ)
                while True:
                    for key, _ in selector.select():
                        report = key.fileobj.receive()  # type: ignore[union-attr]
                        if isinstance(report, Ready):
                            return report
                        if isinstance(report, Failed):
                            raise report.error
        except EOFError:
            raise RankLost(self.cause(None)) from None

    def cause(self, told: Exception | None) -> str:
        """Why the ranks are gone: who was killed, else what a rank has told, else who has ended."""
        end = time.monotonic() + _CAUSE
        codes: dict[int, int] = {}
        while time.monotonic() < end and not any(code < 0 for code in codes.values()):
            codes = {
                rank: process.returncode
                for rank, process in enumerate(self._processes)
                if process.poll() is not None and process.returncode is not None
            }
            time.sleep(0.01)
        for rank, code in codes.items():
            if code < 0:
                name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
                return f"rank {rank} of {self.size} was killed ({name})"
        if told is not None:
            return first_line(str(told), otherwise=type(told).__name__)
        for rank, code in codes.items():
            return f"rank {rank} of {self.size} ended with exit code {code}"
        return "the ranks of the model have closed their connections"

    def wait(self) -> None:
        """Give ranks that were told to end the time for it, then end them."""
        end = time.monotonic() + _PATIENCE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End them at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for link in self.links:
            link.close()
        self._store = None

    def _start(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self.links.append(Link(ours))
        with theirs:
            # Without -P a folder of the user's could hide one of Python's modules.
            command = [sys.executable, "-P", "-m", "accessory.serve.worker", str(theirs.fileno())]
            self._processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()]
                )
            )
