"""Kinds of arguments that several programs take, for argparse's ``type``: each refuses what cannot be meant."""

import argparse
from pathlib import Path


def given_name(text: str) -> str:
    """A name that is not empty. As a path an empty one is the current folder, as a host it is every address."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name was given: is a variable of your script not set?")
    return text


def given_path(text: str) -> Path:
    """A path, in the same way."""
    return Path(given_name(text))


def given_number(text: str, least: int, most: int | None, fit: str) -> int:
    """A whole number within bounds; ``fit`` says in words what to give."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise argparse.ArgumentTypeError(f"{text!r} given: give {fit}")
    return value


def given_seed(text: str) -> int:
    """What `torch.manual_seed` takes."""
    return given_number(text, -(2**63), 2**64 - 1, "a whole number from -2^63 to 2^64 - 1")
