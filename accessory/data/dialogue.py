"""Dialogues, {"conversations": [{"from", "value"}, ...]}: questions and answers in turn."""

from __future__ import annotations

import json
from typing import Any

from accessory.data.examples import TrainingText
from accessory.errors import shown, shown_keys
from accessory.text.conversation import default_conversation

_HUMAN = ("human",)
_ASSISTANT = ("gpt", "assistant")


def dialogue_text(record: Any) -> TrainingText:
    """The text of a dialogue in the form of default_conversation.

    Every answer is learned, with its end signal and the space before it; the end token is not, since a
    conversation may go on. Raises ValueError with the reason, without file or line, for a record of another form.
    """
    turns = read_turns(record)
    conversation = default_conversation()
    conversation.load_qas(turns)
    # A prompt ends at "Assistant:", so the space is the model's to say. Most answers' first token holds it; before
    # a digit or a Chinese character it is a token of its own, which has to be learned as well.
    spans = [(begin - 1, end) for begin, end in conversation.answer_spans()]
    return TrainingText(conversation.get_prompt(), spans, False, any(answer for _, answer in turns))


def read_turns(record: Any) -> list[tuple[str, str]]:
    """The questions and answers of a dialogue, white space around them stripped.

    Human and gpt (or assistant), in any case, must alternate, and human begins. A question at the end, which
    nobody answers, is left out: nothing follows it that could be learned. Raises ValueError with the reason.
    """
    values: list[str] = []
    for number, turn in enumerate(_turns(record), start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise ValueError(f"turn {number} of its conversations is no object with a string under 'from'")
        speaker, value = turn["from"], turn.get("value")
        if not isinstance(value, str):
            raise ValueError(f"turn {number} of its conversations has no string under 'value'")
        expected = _ASSISTANT if len(values) % 2 else _HUMAN
        if speaker.strip().lower() not in expected:
            raise ValueError(
                f"turn {number} of its conversations is from {shown(speaker)}, not from {' or '.join(expected)}: "
                "human and gpt must alternate, and human begins"
            )
        values.append(value.strip())
    return list(zip(values[0::2], values[1::2], strict=False))


def _turns(record: Any) -> list[Any]:
    if not isinstance(record, dict):
        raise ValueError('it is not an object {"conversations": [...]}')
    if "conversations" not in record:
        hint = "; an Alpaca record is read without --dialog" if "output" in record else ""
        hint = "; convert it with accessory.tools.prepare_data ultrachat" if "messages" in record else hint
        raise ValueError(f"it has no 'conversations', only {shown_keys(record)}{hint}")
    turns = record["conversations"]
    if isinstance(turns, str):  # a field of a CSV file
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise ValueError("its 'conversations' is a string that is not valid JSON") from error
    if not isinstance(turns, list) or not turns:
        raise ValueError("its 'conversations' is not a list of turns")
    return turns
