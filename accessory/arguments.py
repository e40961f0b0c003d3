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


def given_seed(text: str) -> int:
    """What `torch.manual_seed` takes."""
    try:
        value = int(text)
    except ValueError:
        value = 2**64
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} given: give a whole number from -2^63 to 2^64 - 1")
    return value
