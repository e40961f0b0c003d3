"""What commands write: their results from rank 0 alone, and errors as one line."""

import sys

from accessory.log import global_rank


def say(error: Exception) -> None:
    """One line on standard error."""
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()


def show(text: str) -> None:
    """Text on standard output, at once; from rank 0 alone."""
    if global_rank() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()
