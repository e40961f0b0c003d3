"""Hugging Face chat templates as text.

A template is a program that came with a checkpoint, and what it works on came with a request. So it runs elsewhere, in
one process of few rights (jinja_worker.py), which is kept for the next rendering and replaced where it took too much.
"""

import atexit
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

SECONDS = 2  # of processor time for one rendering, its template's compilation included
MEGABYTES = 256  # beyond what the process takes at rest

_WORKER = Path(__file__).with_name("jinja_worker.py")
_ENDS = {
    -signal.SIGPROF: f"the chat template takes more than {SECONDS} s",
    errno.ENOMEM: f"the chat template takes more than {MEGABYTES} MB",
    errno.ENOPKG: "chat templates need jinja2: pip install jinja2",
}


class TemplateError(ValueError):
    """A chat template that cannot be rendered, or refuses what it is given; the message is one line."""


@dataclass(frozen=True)
class Rendered:
    """A chat as text, and where in its characters the template's blocks of generation stand."""

    text: str
    generated: tuple[tuple[int, int], ...]


def render(template: str, variables: Mapping[str, Any]) -> Rendered:
    """What ``apply_chat_template`` gives; the variables (messages, bos_token, ...) are plain JSON values."""
    return render_each(template, [variables])[0]


def render_each(template: str, cases: Sequence[Mapping[str, Any]]) -> list[Rendered]:
    """One template with the variables of each case, in one round trip."""
    job = {"template": template, "now": datetime.now().isoformat(), "cases": [dict(case) for case in cases]}
    try:
        request = json.dumps(job, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except RecursionError:
        raise TemplateError("what the chat template is given is nested too deeply") from None
    result = json.loads(_RENDERER.ask(request).decode("utf-8", "surrogatepass"))
    if "error" in result:
        raise TemplateError(result["error"])
    return [Rendered(text, tuple((start, end) for start, end in spans)) for text, spans in result["rendered"]]


class _Renderer:
    """The process that renders for this one. Threads take turns; a forked child gets its own."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self._end)
        os.register_at_fork(before=self._turn.acquire, after_in_parent=self._turn.release, after_in_child=self._leave)

    def ask(self, request: bytes) -> bytes:
        with self._turn:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._end()
                    self._process = _start()
                return _round_trip(self._process, request)
            except BaseException:  # Ctrl-C too: an answer that nobody read would be the next one's
                self._end()
                raise

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes the pipes, and waits

    def _leave(self) -> None:
        """In a forked child: the process is the parent's, to ask and to wait for."""
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
        self._turn.release()


_RENDERER = _Renderer()


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", str(_WORKER), str(SECONDS), str(MEGABYTES), *map(os.path.abspath, sys.path)]
    env = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}  # Python may need it
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    try:  # the session is its own: the terminal's signals are meant for who asks
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, cwd="/", env=env, start_new_session=True)
    except OSError as error:
        raise TemplateError(f"the process for chat templates does not start: {error}") from None


def _round_trip(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    jobs, answers = process.stdin, process.stdout
    assert jobs
    assert answers
    with suppress(BrokenPipeError):  # how it ended says more
        jobs.write(len(request).to_bytes(8, "big") + request)
        jobs.flush()
    size = int.from_bytes(answers.read(8), "big")
    answer = answers.read(size)
    if not size or len(answer) < size:
        status = process.wait()
        raise TemplateError(_ENDS.get(status, f"the chat template ended its process (status {status})"))
    return answer
