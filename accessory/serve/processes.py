"""The rank processes of a driver: started with a connection to each, watched, and ended."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

import accessory
from accessory.errors import first_line
from accessory.serve.messages import Failed, Link, Ready, Setup
from accessory.serve.ranks import check_count
from accessory.serve.request import RankLost

# Seconds for ranks that were told to end to do so by themselves.
_PATIENCE = 3.0
# Seconds in which the cause of a loss shows: the rank that died first and those that follow it end almost together.
_CAUSE = 0.5


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many ranks there are, and where.

    Attributes:
        cards: their GPUs; None: those that they find, or the CPU.
        on_cpu: they compute on the CPU, and share its cores.
        master_addr, master_port: where they meet; None: a port that is free.
    """

    size: int
    cards: Sequence[int] | None = None
    on_cpu: bool = False
    master_addr: str = "127.0.0.1"
    master_port: int | None = None

    @classmethod
    def of(
        cls,
        ranks: int | None,
        gpu_ids: Sequence[int] | None,
        *,
        device: Any,
        master_addr: str = "127.0.0.1",
        master_port: int | None = None,
    ) -> Self:
        """Where so many ranks, or one for each of these cards, compute by the rules of `process_group_of_launcher`.

        Raises:
            ValueError: naming the argument.
        """
        if ranks is not None:
            check_count("ranks", ranks, least=1)
        if gpu_ids is not None:
            _check_cards(gpu_ids, ranks)
        size = ranks or (1 if gpu_ids is None else len(gpu_ids))
        count = torch.cuda.device_count()
        on_cpu = str(device) == "cpu" or count < size
        if gpu_ids is not None and not on_cpu and max(gpu_ids) >= count:
            raise ValueError(f"gpu_ids {list(gpu_ids)} go beyond the {count} GPUs of this machine, 0 to {count - 1}")
        return cls(
            size=size,
            cards=None if on_cpu else gpu_ids,
            on_cpu=on_cpu,
            master_addr=master_addr,
            master_port=master_port,
        )


class RankProcesses:
    """Processes that hold a model together, children of this one.

    They end with this process, however it ends: each watches its connection.

    Attributes:
        links: a connection to each, by rank.
        over: whether their end has been seen to.
    """

    def __init__(self, placement: Placement) -> None:
        self.size = size = placement.size
        self.links: list[Link] = []
        self.over = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._store, port = _store(placement.master_addr, placement.master_port or 0)
        shared = environment_of(placement) | {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": placement.master_addr,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        try:
            for rank in range(size):
                self._start(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
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


def _check_cards(gpu_ids: Sequence[int], ranks: int | None) -> None:
    known = isinstance(gpu_ids, Sequence) and all(type(card) is int and card >= 0 for card in gpu_ids)
    if not known or not gpu_ids or len(set(gpu_ids)) < len(gpu_ids):
        raise ValueError(f"gpu_ids must be the numbers of different cards, not {gpu_ids!r}")
    if ranks not in (None, len(gpu_ids)):
        raise ValueError(f"{ranks} ranks were asked for on {len(gpu_ids)} cards: give one of ranks and gpu_ids")


def _store(address: str, port: int) -> tuple[dist.Store | None, int]:
    """Serve the store at which the ranks meet; at an address of this host alone, so that nothing else can reach it.

    Raises:
        OSError: the address is not this host's, or the port is taken.
    """
    with contextlib.ExitStack() as opened:
        try:
            family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            listener = opened.enter_context(socket.socket(family, kind))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
        except OSError as error:
            raise OSError(
                f"the ranks cannot meet at {address}:{port} ({error.strerror}): give another master_port or master_addr"
            ) from None
        opened.pop_all()
    port = listener.getsockname()[1]
    store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def environment_of(placement: Placement) -> dict[str, str]:
    """What the ranks inherit, without another launcher's variables."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))}
    if placement.on_cpu:
        threads = max(1, len(os.sched_getaffinity(0)) // placement.size)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        if "OMP_WAIT_POLICY" not in environment:
            # A thread that waits for another soon lets go of its core. By default it holds it for milliseconds, and
            # beside a server that wants some of the cores itself a step then took ten times as long.
            environment.setdefault("GOMP_SPINCOUNT", "1000")
    elif placement.cards is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = seen.split(",") if seen else [str(card) for card in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[card] for card in placement.cards)
    root = str(Path(accessory.__file__).parent.parent)
    found = environment.get("PYTHONPATH", "").split(os.pathsep)
    # The package may lie where only this program looks.
    if root not in found and not root.endswith("-packages"):
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, found)])
    return environment
