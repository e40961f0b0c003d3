"""Checks of values that come from a JSON file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file; errors name the file."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): correct it or copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


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
