"""The prompts, to the byte: finetuned models were trained on exactly these strings."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accessory.data.conversation import default_conversation
from accessory.data.system_prompt import PROMPT_NAMES, format_prompt

# Written out here in full, on purpose: a test that builds them from shared parts would follow a change.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nName a colour.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nName a colour.\n\n### Input:\nof the sea\n\n### Response:"
)
SHORTQA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request using a single word or phrase."
    "\n\n### Instruction:\nName a colour.\n\n### Response:"
)
QG = "Generate a question whose answer is:\nName a colour.\n\nQuestion:\n"
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n###"
)


@pytest.mark.parametrize(
    ("name", "given_input", "expected"),
    [
        ("alpaca", "of the sea", ALPACA_INPUT),
        ("alpaca", "", ALPACA),
        ("alpaca", " \n\t", ALPACA),
        ("alpaca", None, ALPACA),
        ("None", "of the sea", "Name a colour."),
        ("None", "", "Name a colour."),
        ("shortqa", "of the sea", SHORTQA),
        ("shortqa", "", SHORTQA),
        ("qg", "of the sea", QG),
        ("qg", None, QG),
    ],
)
def test_each_prompt(name: str, given_input: str | None, expected: str) -> None:
    assert format_prompt({"instruction": "Name a colour.", "input": given_input}, name) == expected
    if not given_input:
        assert format_prompt({"instruction": "Name a colour."}, sys_name=name) == expected


def test_alpaca_is_the_default_and_any_mapping_will_do() -> None:
    record = UserDict(instruction="Name a colour.", input="of the sea", output="blue")
    assert format_prompt(record) == ALPACA_INPUT


def test_the_names_are_those_that_command_lines_offer() -> None:
    assert PROMPT_NAMES == ("alpaca", "None", "shortqa", "qg")


@given(instruction=st.text(), given_input=st.text().filter(str.strip))
def test_values_are_put_in_as_they_are(instruction: str, given_input: str) -> None:
    """No stripping, and braces or percent signs are characters like others."""
    prompt = format_prompt({"instruction": instruction, "input": given_input})
    before, after = ALPACA_INPUT.split("Name a colour.\n\n### Input:\nof the sea")
    assert prompt == f"{before}{instruction}\n\n### Input:\n{given_input}{after}"


def test_braces_are_not_fields() -> None:
    assert format_prompt({"instruction": "{input} {0} %s", "input": "{instruction}"}, "None") == "{input} {0} %s"


@pytest.mark.parametrize("name", ["vicuna", "none", "ALPACA", "", None])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="alpaca, None, shortqa, qg"):
        format_prompt({"instruction": "x", "input": ""}, name)


@pytest.mark.parametrize("record", ["Name a colour.", None, ["instruction"], ("a", "b")])
def test_what_is_no_dictionary_is_refused(record: Any) -> None:
    with pytest.raises(ValueError, match="format_dict takes a dictionary"):
        format_prompt(record)


@pytest.mark.parametrize("name", PROMPT_NAMES)
@pytest.mark.parametrize(
    "record", [{}, {"input": "x"}, {"instruction": None}, {"instruction": 3}, {"Instruction": "x"}]
)
def test_a_missing_instruction_is_named(record: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match="'instruction'"):
        format_prompt(record, name)


def test_an_input_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'input'"):
        format_prompt({"instruction": "x", "input": 3})


def test_an_open_conversation() -> None:
    conversation = default_conversation()
    conversation.load_qas([["What is 2 + 2?", None]])
    assert conversation.get_prompt() == SYSTEM + " Human: What is 2 + 2?\n### Assistant:"
    assert conversation.response_end_signal == "\n###"


def test_several_turns() -> None:
    conversation = default_conversation()
    conversation.load_qas([["What is 2 + 2?", "4."], ["And 3 + 3?", None]])
    assert conversation.get_prompt() == (
        SYSTEM + " Human: What is 2 + 2?\n### Assistant: 4.\n### Human: And 3 + 3?\n### Assistant:"
    )
    conversation.load_qas([("What is 2 + 2?", "4."), ("And 3 + 3?", "")])
    assert conversation.get_prompt() == (
        SYSTEM + " Human: What is 2 + 2?\n### Assistant: 4.\n### Human: And 3 + 3?\n### Assistant: \n###"
    )


def test_no_turns() -> None:
    assert default_conversation().get_prompt() == SYSTEM


def test_conversations_share_nothing_and_loading_replaces() -> None:
    first, second = default_conversation(), default_conversation()
    first.load_qas([["a", "b"], ["c", None]])
    assert second.get_prompt() == SYSTEM
    first.load_qas([["d", None]])
    assert first.get_prompt() == SYSTEM + " Human: d\n### Assistant:"


texts = st.text(max_size=20)


@given(closed=st.lists(st.tuples(texts, texts), max_size=4), question=texts, is_open=st.booleans())
def test_each_answer_stands_between_its_question_and_the_end_signal(
    closed: list[tuple[str, str]], question: str, is_open: bool
) -> None:
    conversation = default_conversation()
    conversation.load_qas([*closed, (question, None)] if is_open else closed)
    rest = conversation.get_prompt().removeprefix(SYSTEM)
    for asked, answer in closed:
        turn = f" Human: {asked}\n### Assistant: {answer}{conversation.response_end_signal}"
        assert rest.startswith(turn)
        rest = rest[len(turn) :]
    assert rest == (f" Human: {question}\n### Assistant:" if is_open else "")


@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_a_prompt_is_the_beginning_of_its_answered_text(turns: list[tuple[str, str]]) -> None:
    """What inference is given is what training saw before the answer."""
    opened, answered = default_conversation(), default_conversation()
    opened.load_qas([*turns[:-1], (turns[-1][0], None)])
    answered.load_qas(turns)
    assert answered.get_prompt() == opened.get_prompt() + f" {turns[-1][1]}\n###"


@pytest.mark.parametrize(
    "qas",
    [
        [["a", None], ["b", "c"]],  # only the last answer may be open
        [[None, "a"]],
        [["a", 3]],
        [["a"]],
        [["a", "b", "c"]],
        ["ab"],
        "ab",
    ],
)
def test_bad_turns_are_refused(qas: Any) -> None:
    conversation = default_conversation()
    conversation.load_qas([["kept", None]])
    with pytest.raises(ValueError, match=r"turn|load_qas"):
        conversation.load_qas(qas)
    assert conversation.get_prompt() == SYSTEM + " Human: kept\n### Assistant:"
