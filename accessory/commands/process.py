"""How the process of a program begins and ends; imported before all else that a program imports."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def run(program: Callable[[], int]) -> NoReturn:
    """Run a program, which imports what it needs itself, and end the process with its exit code.

    Ctrl-C while it still imports is said in one line, by rank 0 alone. Who handles it later returns a code.
    """
    try:
        code = program()
    except SystemExit as error:  # the parser's
        code = int(error.code or 0)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                sys.stderr.write("interrupted (Ctrl-C)\n")
    end(code)


def end(code: int) -> NoReturn:
    """End the process at once.

    Threads that wait for a rank which is gone must not hold it back, and gloo's may outlive the groups they served and
    abort a Python that is shutting down (PyTorch's issue 190489). Everything is done by now, and said where there is
    still somebody to read it.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the terminal is closed, or the pipe
            code = code or int(stream is sys.stdout)
    os._exit(code)
