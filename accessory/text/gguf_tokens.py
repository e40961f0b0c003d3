"""How a GGUF file lists a tokenizer's tokens, of whatever kind it is: its keys, types of tokens, and rows of none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accessory.errors import shown

KEY = "tokenizer.ggml."
# Types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# What Hugging Face's settings call the tokens of roles.
ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
# Of tokens that end an answer beside "eos".
MORE_ENDS = ("eot", "eom")


def numbers_of(values: Mapping[str, Any], name: str, count: int) -> np.ndarray | None:
    """An array with a number for each token, where there is one."""
    found = values.get(f"{KEY}{name}")
    return found if isinstance(found, np.ndarray) and len(found) == count else None


def types_of(values: Mapping[str, Any], count: int) -> np.ndarray | None:
    """The type of each token, where all are known."""
    found = numbers_of(values, "token_type", count)
    known = found is not None and found.dtype.kind in "iu" and bool(((found >= NORMAL) & (found <= BYTE)).all())
    return found if known else None


def token_of(values: Mapping[str, Any], path: Path, role: str, count: int, default: int | None = None) -> int | None:
    """The token of a role.

    Raises:
        ValueError: it is none of the tokens; names the file.
    """
    found = values.get(f"{KEY}{role}_token_id", default)
    if found is not None and (type(found) is not int or not 0 <= found < count):
        raise ValueError(f"{path}: {KEY}{role}_token_id is {shown(found)}, and there are {count} tokens: copy it again")
    return found


def pad_name(token: int) -> str:
    """What a row is called that is no token and fills a vocabulary up."""
    return f"[PAD{token}]"
