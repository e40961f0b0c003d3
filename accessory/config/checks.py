"""Checks of values that come from a JSON file."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accessory.errors import nearest

Part = TypeVar("Part")

# No size of a model comes near it, and PyTorch fails in its own words on what its integers cannot hold.
MOST = 2**31


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file; errors name the file."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would never end
        raise ValueError(f"{path} cannot be read as JSON (it is no plain file): put the checkpoint's own there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError, RecursionError) as error:  # a number of too many digits is a bare ValueError
        raise ValueError(f"{path} cannot be read as JSON ({error}): correct it or copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def part_of_config(name: str, kind: type[Part], values: Any) -> Part:
    """The dataclass that stands in a config.json as an object under ``name``; one that is made already stays.

    Raises:
        ValueError: no object, or an unknown key in it.
    """
    if isinstance(values, kind):
        return values
    known = [one.name for one in dataclasses.fields(kind)]  # type: ignore[arg-type]  # all parts are dataclasses
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be an object with {', '.join(known[:-1])} and {known[-1]}, not {values!r}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        said = ", ".join(key + nearest(key, known) for key in unknown)
        raise ValueError(f"unknown key(s) in {name}: {said}; known are {', '.join(sorted(known))}")
    return kind(**values)


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Where two configs differ: the key, as in "moe.router.score", and what each has there, or None."""
    for key in (*first, *(key for key in second if key not in first)):
        one, other = first.get(key), second.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, f"{within}{key}.")
        elif one != other:
            yield f"{within}{key}", one, other


def is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def require_ints(args: Any, positive: Sequence[str] = (), positive_or_unset: Sequence[str] = ()) -> None:
    for name in (*positive, *positive_or_unset):
        value = getattr(args, name)
        unset = name in positive_or_unset and value == -1
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and not unset):
            raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
        if value >= MOST:
            raise ValueError(f"{name} is {value}: give a number below 2^31")
