"""Programs that a test starts, watches line by line, sends signals to, and of which it leaves nothing behind."""

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from patience import PATIENCE
from ranks import free_port

_LAUNCHER_VARIABLES = re.compile(r"RANK|WORLD_SIZE|LOCAL_\w+|MASTER_\w+|SLURM_\w+|TORCHELASTIC_\w+|ACCESSORY_TEST")


class Program:
    """A running command and all that it started, with one thread for each process.

    Args:
        folder: to start it in.
        terminal: what it reads from and writes to, beside standard error.

    Attributes:
        lines: what it has written so far, standard output and standard error together; not to a terminal.
        process: the command itself.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        folder: Path | None = None,
        terminal: int | None = None,
    ) -> None:
        mark = uuid.uuid4().hex
        self._mark = f"ACCESSORY_TEST={mark}".encode()
        clean = {key: value for key, value in os.environ.items() if not _LAUNCHER_VARIABLES.fullmatch(key)}
        clean |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(environment or {}), "ACCESSORY_TEST": mark}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=clean,
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.STDOUT if terminal is None else subprocess.PIPE,
            start_new_session=True,
        )
        output = self.process.stdout if terminal is None else self.process.stderr
        assert output is not None
        self._output = output
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.process.wait()
        self._reader.join()
        self._output.close()
        if error is not None:
            error.add_note(self.text)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> str:
        """Wait for a line in which ``pattern`` is found; returns it.

        Raises:
            AssertionError: the output ended, or it took too long.
        """
        seen, end = 0, time.monotonic() + seconds
        while True:
            over = not self._reader.is_alive()
            new = self.lines[seen:]
            for line in new:
                if re.search(pattern, line):
                    return line
            seen += len(new)
            assert not over, f"ended without {pattern!r}\n{self.text}"
            assert time.monotonic() < end, f"no {pattern!r} within {seconds} s\n{self.text}"
            with self._news:
                if len(self.lines) == seen:
                    self._news.wait(0.05)

    def send(self, number: signal.Signals) -> None:
        """Send the command itself a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code of the command."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {seconds} s\n{self.text}") from None

    def wait_for_all(self, seconds: float = PATIENCE) -> None:
        """Wait until nothing that the command started is left.

        Raises:
            AssertionError: something was.
        """
        end = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < end, f"left after {seconds} s: {left}\n{self.text}"
            time.sleep(0.05)
        self._reader.join()

    def processes(self, wanted: Callable[[dict[str, str]], bool] = lambda environment: True) -> dict[int, str]:
        """Ids and command lines of the command and all it started whose environment is ``wanted``."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                pairs = dict(variable.decode(errors="replace").partition("=")[::2] for variable in variables)
                if self._mark in variables and wanted(pairs):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        return found

    def rank(self, number: int) -> int:
        """Process id of a rank, by what the launcher told it."""
        (found,) = self.processes(lambda environment: environment.get("RANK") == str(number))
        return found

    def kill(self) -> None:
        """kill -9 of everything, until nothing is left."""
        while left := self.processes():
            for number in left:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            self.process.poll()  # takes the dead one off the list
            time.sleep(0.01)

    def _read(self) -> None:
        for line in self._output:
            with self._news:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self._news.notify_all()


def by_hand(size: int) -> list[dict[str, str]]:
    """The variables of so many ranks that no launcher watches."""
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(size)
    ]


@contextmanager
def slowed(processes: Collection[int], share: float = 0.1) -> Iterator[None]:
    """Let processes run a tenth of the time: what they do is caught midway, however busy the machine is."""
    over = threading.Event()

    def send(number: signal.Signals) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def run() -> None:
        while not over.wait(0.005):
            send(signal.SIGSTOP)
            over.wait(0.005 * (1 / share - 1))
            send(signal.SIGCONT)

    thread = threading.Thread(target=run, name="slowed")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
