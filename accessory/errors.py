"""Exceptions that users meet."""


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file or tensor and the way out."""
