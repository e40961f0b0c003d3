"""Real processes over gloo for the tests: a pool is started once per world size and sent test functions."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

START_SECONDS = 120
CALL_SECONDS = 120


class RankFailure(AssertionError):
    """A test function raised on some rank; carries the ranks' tracebacks."""


class RankPool:
    """``size`` processes that have joined one gloo group and wait for functions.

    A function must be importable from a test module; it is called as ``function(*arguments)`` on every rank, with
    ``torch.distributed`` initialised, and returns something picklable.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        """The function's results, by rank.

        Raises:
            RankFailure: with the traceback of each rank that raised.
            TimeoutError: a rank did not answer in time; the pool's processes are killed.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._collect(seconds)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(START_SECONDS)

    def _collect(self, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"rank {rank} of {self.size} did not answer within {seconds} s")
                answers.append(pipe.recv())
            except (TimeoutError, EOFError):
                self.close()
                raise
        failures = [f"--- rank {rank}\n{text}" for rank, (text, _) in enumerate(answers) if text]
        if failures:
            # Ranks that failed alone leave their peers' collectives in an unknown state.
            self.close()
            raise RankFailure("\n".join(failures))
        return [result for _, result in answers]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def error_of(function: Callable[..., Any], *arguments: Any, **settings: Any) -> tuple[str, str]:
    """Type name and text of what a call raises; ("", "") where it succeeds."""
    try:
        function(*arguments, **settings)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    pipe.send(("", None))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("", function(*arguments))
        except BaseException:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
