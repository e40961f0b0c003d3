"""The prompts that an instruction is put into, by name.

A finetuned model answers well only to the text that it was trained on, so none of these strings may change,
not by a space: tests/test_prompts.py holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accessory.errors import shown, shown_keys

PROMPT_NAMES = ("alpaca", "None", "shortqa", "qg")


def format_prompt(format_dict: Mapping[str, Any], sys_name: str = "alpaca") -> str:
    """The prompt for `format_dict`, whose keys are "instruction" and, where there is one, "input".

    `sys_name` is one of PROMPT_NAMES. "alpaca" has a form with the input and one without, which it also takes
    for an input of white space; the other three leave the input out. "None" is the instruction alone. Values
    are put in as they are: braces in them mean nothing.

    Raises ValueError for another name, and for an instruction that is absent or not a string.
    """
    if sys_name not in PROMPT_NAMES:
        raise ValueError(f"unknown sys_name {sys_name!r}: take one of {', '.join(PROMPT_NAMES)}")
    if not isinstance(format_dict, Mapping):
        raise ValueError(f'format_dict takes a dictionary {{"instruction": ..., "input": ...}}, not {format_dict!r}')
    instruction = _string(format_dict, "instruction")
    if sys_name == "None":
        return instruction
    if sys_name == "qg":
        return f"Generate a question whose answer is:\n{instruction}\n\nQuestion:\n"
    if sys_name == "shortqa":
        return _alpaca("completes the request using a single word or phrase.", instruction)
    given = _string(format_dict, "input") if format_dict.get("input") is not None else ""
    return _alpaca("completes the request.", instruction, given)


def _alpaca(wish: str, instruction: str, given: str = "") -> str:
    """Stanford Alpaca's prompt, with or without an input; `wish` ends its first paragraph."""
    has_input = bool(given.strip())
    setting = ", paired with an input that provides further context" if has_input else ""
    between = f"\n\n### Input:\n{given}" if has_input else ""
    return (
        f"Below is an instruction that describes a task{setting}. Write a response that appropriately {wish}"
        f"\n\n### Instruction:\n{instruction}{between}\n\n### Response:"
    )


def _string(format_dict: Mapping[str, Any], key: str) -> str:
    value = format_dict.get(key)
    if not isinstance(value, str):
        found = f"{shown(value)} under it" if key in format_dict else f"only {shown_keys(format_dict)}"
        raise ValueError(f"the prompt needs a string under {key!r}, and the dictionary has {found}")
    return value
