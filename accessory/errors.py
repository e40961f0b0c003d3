"""Exceptions that users meet, and others' put briefly."""


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file or tensor and the way out."""


def first_line(text: str, *, otherwise: str) -> str:
    """The first line of a message that may be a page, without its full stop; ``otherwise`` where there is none."""
    return next(iter(text.strip().splitlines()), otherwise).rstrip(".")
