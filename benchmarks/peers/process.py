"""A side as a process of its own, which runs while it is asked and is stopped between: it costs the others nothing."""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import rss_anon

# How often the memory of a process that loads is looked at, in seconds.
GLANCE = 0.005


class SideError(Exception):
    """Why a side gave no answer; ``lost``: there will be no other."""

    def __init__(self, reason: str, *, lost: bool) -> None:
        super().__init__(reason)
        self.lost = lost


class SideProcess:
    """A side that was started.

    Args:
        command: what runs it.
        environment: variables for it beside those of this process; one that is None is left out.
        log: file that gets what it says beside its answers.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str | None], log: Path) -> None:
        variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
        self.started, self.log = time.perf_counter(), log
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=variables,
                bufsize=0,
                start_new_session=True,
            )
        self._pending = b""

    def ask(self, *, timeout: float, **call: Any) -> dict[str, Any]:
        """Its answer; that to "load" holds the peaks of its memory besides, in bytes.

        Raises:
            SideError: it says that it cannot, or it ended, or it took longer than ``timeout`` seconds; it is gone
                then.
        """
        self._signal(signal.SIGCONT)
        assert self._process.stdin
        peak = 0
        try:
            self._process.stdin.write(json.dumps(call).encode() + b"\n")
            line = b""
            end = time.perf_counter() + timeout
            while not line:
                if call["call"] == "load":
                    peak = max(peak, self._private())
                line = self._line(GLANCE if call["call"] == "load" else 1.0)
                if time.perf_counter() > end:
                    raise SideError(f"no answer to {_shown(call)} in {timeout:.0f} s", lost=True)
        except (BrokenPipeError, EOFError):
            self.close()
            raise SideError(f"ended with {self._process.returncode}: {self._last_words()}", lost=True) from None
        except SideError:
            self.close()
            raise
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"], lost=call["call"] == "load")
        if call["call"] == "load":
            answer |= {"peak_private": max(peak, self._private()), "peak_resident": self._resident()}
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End it, with what it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()

    def _line(self, wait: float) -> bytes:
        """A line of its output, or nothing where none came in ``wait`` seconds."""
        assert self._process.stdout
        if b"\n" not in self._pending and select.select([self._process.stdout], [], [], wait)[0]:
            part = os.read(self._process.stdout.fileno(), 2**16)
            if not part:
                raise EOFError
            self._pending += part
        line, newline, rest = self._pending.partition(b"\n")
        if not newline:
            return b""
        self._pending = rest
        return line

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _private(self) -> int:
        try:
            return rss_anon(self._process.pid)
        except (AssertionError, OSError):  # it ends
            return 0

    def _resident(self) -> int:
        """The most memory that it ever held, pages of mapped files included, in bytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def _last_words(self) -> str:
        words = self.log.read_text(errors="replace").strip().splitlines()
        return f"{words[-1][:300]} ({self.log})" if words else f"it said nothing ({self.log})"


def _shown(call: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in call.values())
