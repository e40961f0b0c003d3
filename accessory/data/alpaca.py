"""Alpaca records, {"instruction", "input", "output"}: a prompt and its answer."""

from __future__ import annotations

from typing import Any

from accessory.data.examples import TrainingText
from accessory.errors import shown, shown_keys
from accessory.text.instruction import format_prompt


def alpaca_text(record: Any, *, prompt_type: str = "alpaca", preprocess: str = "alpaca") -> TrainingText:
    """The text of an Alpaca record: its prompt and, directly after it, its output.

    The output and the end token are learned. `prompt_type` is a name of format_prompt; "input" may be absent.
    With `preprocess` "single_turn_llava" the record is a conversation, and its first question and answer are
    taken. Raises ValueError with the reason, without file or line, for a record of another form.
    """
    if preprocess == "single_turn_llava":
        record = _first_turn(record)
    if not isinstance(record, dict):
        raise ValueError(f"it is {shown(record)}, not an object with instruction and output")
    if "conversations" in record and "output" not in record:
        raise ValueError("it is a dialogue: pass --dialog")
    output = record.get("output")
    if not isinstance(output, str):
        found = f"{shown(output)} under it" if "output" in record else f"only {shown_keys(record)}"
        raise ValueError(f"an Alpaca record needs a string under 'output', and it has {found}")
    prompt = format_prompt(record, prompt_type)
    return TrainingText(prompt + output, [(len(prompt), len(prompt) + len(output))], True, bool(output.strip()))


def _first_turn(record: Any) -> dict[str, Any]:
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        raise ValueError("single_turn_llava needs a list of two or more turns under 'conversations'")
    return {"instruction": turns[0].get("value"), "output": turns[1].get("value")}
