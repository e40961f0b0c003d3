"""The prompts that an instruction is put into, by name.

A finetuned model answers well only to the text that it was trained on, so none of these strings may change,
not by a space: tests/test_prompts.py holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accessory.errors import shown, shown_keys, unknown

_WISHES = {
    "alpaca": "completes the request.",
    "shortqa": "completes the request using a single word or phrase.",
}
PROMPT_NAMES = ("alpaca", "None", "shortqa", "qg")
TAKES_INPUT = "alpaca"  # the one that has a place for the input


def format_prompt(format_dict: Mapping[str, Any], sys_name: str = "alpaca") -> str:
    """The prompt for `format_dict`, whose keys are "instruction" and, where there is one, "input".

    `sys_name` is one of PROMPT_NAMES. "alpaca" has a form with the input and one without, which it also takes
    for an input of white space; the other three leave the input out. "None" is the instruction alone. Values
    are put in as they are: braces in them mean nothing.

    Raises ValueError for another name, and for an instruction that is absent or not a string.
    """
    if sys_name not in PROMPT_NAMES:
        raise ValueError(unknown("sys_name", sys_name, PROMPT_NAMES))
    if not isinstance(format_dict, Mapping):
        raise ValueError(f'format_dict takes a dictionary {{"instruction": ..., "input": ...}}, not {format_dict!r}')
    given = _string(format_dict, "input") if sys_name == TAKES_INPUT and format_dict.get("input") is not None else ""
    return instruction_prompt(_string(format_dict, "instruction"), given, sys_name)


def instruction_prompt(instruction: str, given: str = "", sys_name: str = "alpaca", system: str | None = None) -> str:
    """The prompt of an instruction; `system` stands in the place of its opening sentence, where it has one."""
    opening = "" if system is None else f"{system}\n\n"
    if sys_name == "None":
        return opening + instruction
    if sys_name == "qg":
        return f"{opening}Generate a question whose answer is:\n{instruction}\n\nQuestion:\n"
    has_input = sys_name == TAKES_INPUT and bool(given.strip())
    if system is None:
        setting = ", paired with an input that provides further context" if has_input else ""
        wish = _WISHES[sys_name]
        opening = (
            f"Below is an instruction that describes a task{setting}. Write a response that appropriately {wish}\n\n"
        )
    between = f"\n\n### Input:\n{given}" if has_input else ""
    return f"{opening}### Instruction:\n{instruction}{between}\n\n### Response:"


def _string(format_dict: Mapping[str, Any], key: str) -> str:
    value = format_dict.get(key)
    if not isinstance(value, str):
        found = f"{shown(value)} under it" if key in format_dict else f"only {shown_keys(format_dict)}"
        raise ValueError(f"the prompt needs a string under {key!r}, and the dictionary has {found}")
    return value
