"""Real processes over gloo for the tests: a pool is started once per world size and sent test functions."""

import ctypes
import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from patience import PATIENCE
from torch import Tensor

# Every gloo group keeps threads that wake 100 times a second for as long as its process lives, and sockets to its
# peers. Ranks that have gathered more are replaced by fresh ones, which are there in a fraction of a second.
MOST_THREADS = 48

_PR_SET_PDEATHSIG = 1
# What test modules import; a rank that is forked has them, and one that has to import them takes seconds.
PRELOADED = [
    "accessory.train.finetune",
    "fairscale.nn.model_parallel.initialize",
    "hypothesis",
    "pytest",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "transformers.models.mixtral.modeling_mixtral",
]


class RankFailure(AssertionError):
    """A test function raised on some rank; carries the ranks' tracebacks."""


class RankDied(AssertionError):
    """A rank's process ended while a test function ran; names its exit code."""


class RankPool:
    """``size`` processes that have joined one gloo group and wait for functions.

    A function must be importable from a test module; it is called as ``function(*arguments)`` on every rank, with
    ``torch.distributed`` initialised, and returns something picklable.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = PATIENCE) -> list[Any]:
        """The function's results, by rank.

        Raises:
            RankFailure: with the traceback of each rank that raised.
            RankDied: a rank's process ended; the pool's other processes are killed.
            TimeoutError: a rank did not answer in time; the pool's processes are killed.
        """
        if not self._processes:
            self._start()
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send((function, arguments))
        try:
            return self._collect(seconds)
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _signal(self, number: signal.Signals) -> None:
        """Ranks that wait for a function are stopped: their gloo threads, hundreds in all, would wake all the time."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _start(self) -> None:
        # Forked off a process that has imported everything: a rank is there in 0.1 s instead of 2.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(PATIENCE)

    def _collect(self, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.size} did not answer within {seconds} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                self._processes[rank].join(5)
                code = self._processes[rank].exitcode
                self.close()
                raise RankDied(f"rank {rank} of {self.size} ended with exit code {code}") from None
        failures = [f"--- rank {rank}\n{text}" for rank, (text, _, _) in enumerate(answers) if text]
        # Ranks that failed alone leave their peers' collectives in an unknown state.
        if failures or any(threads > MOST_THREADS for _, _, threads in answers):
            self.close()
        if failures:
            raise RankFailure("\n".join(failures))
        return [result for _, result, _ in answers]


def on_ranks(pools: Callable[[int], RankPool], size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results by rank; one rank is this very process, without any group."""
    return [function(*arguments)] if size == 1 else pools(size).run(function, *arguments)


def alike(results: list[Any]) -> Any:
    """The first rank's result, to the bit that of every other."""
    for result in results[1:]:
        assert_same(result, results[0])
    return results[0]


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        assert_same(list(ours.values()), list(theirs.values()))
    else:
        assert ours == theirs


def free_port() -> int:
    """A port that nothing listens on now, below those that the system gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def error_of(function: Callable[..., Any], *arguments: Any, **settings: Any) -> tuple[str, str]:
    """Type name and text of what a call raises; ("", "") where it succeeds."""
    try:
        function(*arguments, **settings)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def run_command(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with one thread for each process and no launcher's variables around it.

    Raises:
        AssertionError: it did not end in time, or left a process behind; whatever it started is killed.
    """
    mark = f"ACCESSORY_TEST={uuid.uuid4().hex}"
    clean = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {}), **dict([mark.split("=")])}
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=clean,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        stdout, stderr = map(bytes.decode, process.communicate(timeout=seconds))
    except subprocess.TimeoutExpired:
        _kill_marked(mark)
        stdout, stderr = map(bytes.decode, process.communicate())
        raise AssertionError(f"{command} did not end within {seconds} s\n{stdout}\n{stderr}") from None
    left = _kill_marked(mark)
    assert not left, f"{command} left processes behind: {left}\n{stdout}\n{stderr}"
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


def _kill_marked(mark: str) -> list[str]:
    """Kill every process that carries the mark in its environment; returns their command lines."""
    killed = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                killed.append((folder / "cmdline").read_text().replace("\0", " "))
                os.kill(int(folder.name), signal.SIGKILL)
    return killed


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.setsid()  # or the end of a shell would reach all of its job, since a member of it is stopped
    if sys.platform == "linux":  # one that is stopped does not notice that nobody is left to ask it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    pipe.send(("", None, 0))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        failure, result = "", None
        try:
            result = function(*arguments)
        except BaseException:
            failure = traceback.format_exc()
        pipe.send((failure, result, len(os.listdir("/proc/self/task"))))
