"""What commands write, their results from rank 0 alone and errors as one line, and how they end."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from accessory.errors import out_of_memory
from accessory.launch.launcher import Launch, report_failure
from accessory.launch.threads import settle_count
from accessory.log import global_rank, say_error

logger = logging.getLogger(__name__)


def say(error: Exception) -> None:
    """One line on standard error, and in torchrun's report."""
    text = str(out_of_memory(error) or error)
    report_failure(text)
    say_error(text)


def show(text: str) -> None:
    """Text on standard output, at once; from rank 0 alone. Where nobody reads it any more (`head`) the command ends."""
    if global_rank() == 0:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            raise SystemExit(128 + signal.SIGPIPE) from None


def parsed(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """What a program was given; where that is wrong no rank leaves before all have met. Settles the threads.

    Raises:
        SystemExit: the parser has said what is wrong, or shown its help.
    """
    try:
        arguments = parser.parse_args(given)
    except SystemExit as error:
        # With wrong variables of a launcher they cannot meet.
        with contextlib.suppress(ValueError):
            if error.code and Launch.find().has_others:
                from accessory.launch.rendezvous import refuse_together

                refuse_together("its arguments are wrong")
        raise
    settle_count(getattr(arguments, "threads", None))
    return arguments


def refuse(error: ValueError) -> NoReturn:
    """Raise the error of all ranks of a launcher, once, after they have met."""
    from accessory.launch.rendezvous import process_group_of_launcher
    from accessory.parallel.state import on_all_ranks

    with process_group_of_launcher("cpu", say=say):
        raise on_all_ranks(error)
    raise error


def ended(program: Callable[[], None]) -> int:
    """Run a program to its end, saying what went wrong; returns the exit code."""
    try:
        program()
    except KeyboardInterrupt as error:
        if global_rank() == 0 and not error.args:  # else it has been said what became of the work
            logger.warning("interrupted (Ctrl-C)")
        return 130
    except SystemExit as error:
        return int(error.code or 0)
    except Exception as error:
        from accessory.parallel.state import raised_on_all_ranks
        from accessory.serve.request import RankLost

        expected = isinstance(error, OSError | ValueError | FloatingPointError | RankLost)
        if not expected and out_of_memory(error) is None:
            report_failure(traceback.format_exc())
            raise
        if global_rank() == 0 or not raised_on_all_ranks(error):
            say(error)
        return 1
    return 0
