"""What records say: each shape, each refusal, and that shapes and kinds of files say the same."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data.readers import read_records
from accessory.data.records import Instruction, Said, Talk, Text, UnknownField, read_said
from accessory.text.chat import Message

Record = dict[str, Any]
Chat = tuple[str | None, list[tuple[str, str, bool]]]  # the system's message; questions, answers, and what is learned


def talk(*said: str | tuple[str, bool], system: str | None = None) -> Talk:
    """Questions and answers in turn; a pair says whether an answer is learned."""
    messages = [Message("system", system)] if system is not None else []
    for number, text in enumerate(said):
        content, learned = (text, True) if isinstance(text, str) else text
        messages.append(Message("assistant" if number % 2 else "user", content, learned=learned))
    return Talk(tuple(messages))


def sharegpt(*turns: tuple[str, str], **more: Any) -> Record:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **more}


def openai(*turns: tuple[str, Any], **more: Any) -> Record:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


QA = (("human", "Why?"), ("gpt", " So.\n"))
ASKED = talk("Why?", " So.\n")
TWO = (*QA, ("human", "And?"), ("gpt", "Yes."))
WEIGHED = [
    {"role": "user", "content": "a", "weight": 0},
    {"role": "assistant", "content": "b", "weight": 0.0},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "weight": 1},
]
SHAPES: list[tuple[Record, Said]] = [
    (sharegpt(*QA), ASKED),
    (sharegpt((" HUMAN", "Why?"), ("ChatGPT ", " So.\n")), ASKED),
    (sharegpt(("user", "Why?"), ("bard", " So.\n"), id="7"), ASKED),
    (sharegpt(("system", "Be."), *QA), talk("Why?", " So.\n", system="Be.")),
    (sharegpt(("system", ""), *QA), ASKED),
    (sharegpt(*QA, system="Be."), talk("Why?", " So.\n", system="Be.")),
    (sharegpt(("system", "Be."), *QA, system_prompt="Be."), talk("Why?", " So.\n", system="Be.")),
    (sharegpt(*QA, system=" ", system_prompt=None), ASKED),
    (sharegpt(*QA, ("system", "Now."), *QA), Talk((*ASKED.messages, Message("system", "Now."), *ASKED.messages))),
    (sharegpt(*QA, ("human", "nobody answers")), ASKED),
    (sharegpt(*QA, ("system", "a"), ("human", "nobody answers")), ASKED),
    (sharegpt(("human", "nobody answers")), Talk(())),
    (sharegpt(*TWO, only_last=True), talk("Why?", (" So.\n", False), "And?", "Yes.")),
    (sharegpt(*TWO, only_last="TRUE"), talk("Why?", (" So.\n", False), "And?", "Yes.")),
    (sharegpt(*TWO, ("human", "?"), only_last=True), talk("Why?", (" So.\n", False), "And?", "Yes.")),
    (sharegpt(*TWO, only_last=False), talk("Why?", " So.\n", "And?", "Yes.")),
    (sharegpt(*QA, only_last=""), ASKED),
    (sharegpt(("human", "a"), ("gpt", "\n"), ("human", "b"), ("gpt", "")), talk("a", ("\n", False), "b", ("", False))),
    ({"conversations": openai(("user", "Why?"), ("assistant", " So.\n"))["messages"]}, ASKED),
    ({"conversations": ["Why?", " So.\n"], "source": "stackexchange"}, ASKED),
    ({"conversation": openai(("user", "Why?"), ("assistant", " So.\n"))["messages"], "toxic": False}, ASKED),
    ({"conversations": json.dumps(sharegpt(*QA)["conversations"])}, ASKED),
    ({"conversations": [{"from": "human", "value": "Why?", "text": None}, {"role": "gpt", "text": " So.\n"}]}, ASKED),
    (openai(("developer", "Be."), ("user", "Why?"), ("assistant", " So.\n")), talk("Why?", " So.\n", system="Be.")),
    (openai(("user", "Why?"), ("assistant", " So.\n"), prompt="Why?", prompt_id="a", category="Chat"), ASKED),
    (openai(("user", "Why?"), ("assistant", " So.\n"), tools=[], functions=None, images="[]"), ASKED),
    (openai(("user", [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?", "image_url": None}])), Talk(())),
    (openai(("user", "Why?"), ("assistant", [{"type": "text", "text": t} for t in (" So", ".\n")])), ASKED),
    ({"messages": WEIGHED}, talk("a", ("b", False), "c", "d")),
    ({"messages": WEIGHED, "only_last": True}, talk("a", ("b", False), "c", "d")),
    (
        {"messages": [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]},
        Talk((Message("user", "a", "Ann"), Message("assistant", "b"))),
    ),
    ({"interactions": [{"is_user": True, "text": "Why?"}, {"is_user": False, "text": " So.\n"}]}, ASKED),
    ({"instruction": "a", "output": "b"}, Instruction("a", "", "b")),
    ({"instruction": "a", "input": None, "output": "b", "text": "ab"}, Instruction("a", "", "b")),
    (
        {"instruction": "a", "input": "x", "output": "b", "system": "s", "history": [["q", "r"]], "only_last": True},
        Instruction("a", "x", "b", "s", (("q", "r"),), True),
    ),
    ({"instruction": "a", "output": "b", "history": '[["q", ""]]'}, Instruction("a", "", "b", None, (("q", ""),))),
    ({"instruction": "a", "output": "b", "history": "[]", "system": ""}, Instruction("a", "", "b")),
    ({"instruction": "", "input": "a", "output": ""}, Instruction("", "a", "")),
    ({"prompt": "a", "completion": " b"}, Text("a", " b")),
    ({"prompt": "", "completion": ""}, Text("", "")),
    ({"prompt": [WEIGHED[0]], "completion": [WEIGHED[3]]}, talk("a", "d")),
    ({"prompt": [*WEIGHED[2:], WEIGHED[0]], "completion": [WEIGHED[3]]}, talk("c", ("d", False), "a", "d")),
    ({"text": "a", "url": "https://b", "meta": {"c": 1}}, Text("", "a")),
    ({"content": "a"}, Text("", "a")),
    # a table of several shapes' records
    ({"conversations": [], "messages": None, "instruction": "a", "output": "b", "text": ""}, Instruction("a", "", "b")),
    ({"conversations": "", "text": "a"}, Text("", "a")),
]


@pytest.mark.parametrize(("record", "said"), SHAPES)
def test_a_shape(record: Record, said: Said) -> None:
    assert read_said(record) == said
    assert read_said({**record, "ID": 3, "unheard_of": None, "unseen": ""}) == said
    assert read_said({**record, "notes": "a"}, ignore=frozenset({"notes"})) == said


HUB: list[Record] = [
    openai(("user", "q"), ("assistant", "a"), prompt="q", prompt_id="f0e"),  # ultrachat_200k
    sharegpt(
        ("human", "q"), ("gpt", "a"), custom_instruction=False, topic=None, model_name="GPT4", model="gpt-4",
        skip_prompt_formatting=True, category="orca", views=3, language="en", id="1", title="t", idx=2, hash=7,
        avatarUrl="u", system_prompt=None, source="airoboros2.2",
    ),  # OpenHermes-2.5
    {
        "conversations": [
            {"from": "system", "value": "s", "weight": None},
            {"from": "human", "value": "q", "weight": 0.0},
            {"from": "gpt", "value": "a", "weight": 1.0},
        ]
    },  # SlimOrca
    {
        "conversation": [
            {"role": role, "content": role, "header": {"user-agent": "Mozilla"}, "turn_identifier": 7, "toxic": False,
             "redacted": False, "state": "Texas", "country": "United States", "hashed_ip": "3f", "language": "English"}
            for role in ("user", "assistant")
        ],
        "turn": 1, "toxic": False, "redacted": False, "openai_moderation": [{"flagged": False}], "model": "gpt-4",
        "detoxify_moderation": [{"toxicity": 0.1}], "header": {"user-agent": "Mozilla"}, "conversation_hash": "4e",
    },  # WildChat
    {"instruction": "i", "input": "", "output": "a", "text": "i a"},  # alpaca-gpt4
    sharegpt(("human", "q"), ("gpt", "a"), idx="5"),  # WizardLM_evol_instruct_V2
    openai(("user", "q"), ("assistant", "a"), source="Airoboros", num_turns=1),  # Capybara, as TRL has it
    openai(("user", "q"), ("assistant", "a"), prompt="q", prompt_id="f", category="Brainstorm"),  # no_robots
    {"conversations": ["q", "a"], "source": "wikihow"},  # LIMA
    {"text": "### Human: q### Assistant: a"},  # openassistant-guanaco
    {"id": "12", "url": "u", "title": "t", "text": "a"},  # wikipedia
    {"text": "a", "timestamp": "2019-04-25T12:57:54Z", "url": "u"},  # c4
]  # fmt: skip


@pytest.mark.parametrize("record", HUB)
def test_the_datasets_of_the_hub(record: Record) -> None:
    assert read_said(record)


TURN = {"from": "human", "value": "a"}
ALPACA = {"instruction": "a", "output": "b"}
REFUSED: list[tuple[Any, str]] = [
    (None, "it is None, not an object of a known shape, which are {.*"),
    (["a" * 10**6], r"it is .*\.\.\., not an object of a known shape, .*"),
    ({}, r"it is of no known shape, having \[\]; known are {.*}"),
    ({f"key {n}": n for n in range(10**5)}, r"it is of no known shape, having .*\.\.\.\]; known are .*"),
    ({"chosen": "a", "rejected": "b", "prompt": "c"}, "it is of no known shape, having .*'chosen', 'prompt'.*"),
    ({"instruction": "a", "context": "", "response": "b"}, "it is of no known shape, having .*"),
    ({"instruction": "a", "output": None}, r"it is of no known shape, having \['instruction'\]; .*"),
    ({"conversations": []}, r"its 'conversations' is \[\], not a list of turns nor the JSON of one"),
    ({"conversations": "[{"}, "its 'conversations' is .*, not a list of turns nor the JSON of one"),
    ({"conversations": "[" * 10**5}, "its 'conversations' is .*, not a list of turns nor the JSON of one"),
    ({"messages": TURN}, "its 'messages' is .*, not a list of turns nor the JSON of one"),
    ({"messages": [TURN, 3]}, "turn 2 of its messages is 3, not an object"),
    ({"conversations": [{"from": "human"}]}, "turn 1 of its conversations has none of value, content, text: give one"),
    ({"conversations": [{"value": "a"}]}, "turn 1 of its conversations has none of from, role, is_user: give one"),
    (
        {"conversations": [{**TURN, "text": "b"}]},
        "turn 1 of its conversations has 'value' and 'text' of value, content, text: give one",
    ),
    ({"conversations": [{"from": "human", "value": 3}]}, "under 'value' turn 1 .* has 3, and only text can be .*"),
    (sharegpt(("Bob", "a")), r"turn 1 of its conversations has 'Bob' under 'from': it takes system, user \(.*"),
    (sharegpt((3, "a")), "turn 1 of its conversations has 3 under 'from': it takes .*"),  # type: ignore[arg-type]
    ({"conversations": [{"from": True, "value": "a"}]}, "turn 1 of its conversations has True under 'from': .*"),
    ({"interactions": [{"is_user": "user", "text": "a"}]}, "turn 1 .* under 'is_user': .*, is_user true or false"),
    (sharegpt(("gpt", "a")), "turn 1 of its conversations is from the assistant, not from the user: user and .*"),
    (sharegpt(("system", "s"), ("gpt", "a")), "turn 2 of its conversations is from the assistant, not from the user.*"),
    (sharegpt(*QA, ("gpt", "a")), "turn 3 of its conversations is from the assistant, not from the user: .*"),
    (sharegpt(*QA, ("human", "a"), ("human", "b")), "turn 4 of its conversations is from the user, not from .*"),
    (openai(("user", "a"), ("tool", "b")), "turn 2 of its messages has 'tool' under 'role': the use of tools .*"),
    (openai(("function", "b")), "turn 1 of its messages has 'function' under 'role': the use of tools cannot .*"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        r"turn 2 of its messages has \[{}\] under 'tool_calls': the use of tools cannot be trained on",
    ),
    (openai(*QA, tools=[{"type": "function"}]), "it has .* under 'tools': the use of tools cannot be trained on"),
    (
        openai(("user", [{"type": "image_url", "image_url": {"url": "a"}}])),
        "under 'content' turn 1 of its messages has .*image_url.*, and only text can be trained on",
    ),
    (openai(("user", [{"type": "text", "text": None}])), "under 'content' .*, and only text can be trained on"),
    (openai(("user", [{"type": "text", "text": "a", "b": 1}])), "under 'content' .*, and only text can be .*"),
    (sharegpt(*QA, image="a.png"), "it has 'a.png' under 'image': only text can be trained on"),
    ({**ALPACA, "images": ["a.png"]}, r"it has \['a.png'\] under 'images': only text can be trained on"),
    *(
        ({"messages": [{"role": "user", "content": "a", "weight": weight}]}, "turn 1 of its messages has the weight .*")
        for weight in (True, False, 0.5, 2, -1, "1", [])
    ),
    ({"messages": [{"role": "user", "content": "a", "name": 3}]}, "turn 1 of its messages has 3 under 'name', not .*"),
    (sharegpt(*QA, system=3), "it has 3 under 'system', not a string"),
    (sharegpt(("system", "a"), *QA, system="b"), "its system message 'b' is not that of its turns, 'a'"),
    (sharegpt(*QA, system="a", system_prompt="b"), "its 'system' and 'system_prompt' differ: 'a' and 'b'"),
    (sharegpt(*QA, only_last=1), "its 'only_last' is 1: give true or false"),
    (sharegpt(*QA, only_last="yes"), "its 'only_last' is 'yes': give true or false"),
    ({"instruction": 3, "output": "b"}, "it has 3 under 'instruction', not a string"),
    ({"instruction": "a", "output": ["b"] * 10**5}, r"it has .*\.\.\. under 'output', not a string"),
    ({**ALPACA, "input": 3}, "it has 3 under 'input', not a string"),
    ({**ALPACA, "history": "a"}, "its 'history' is 'a', not a list of turns nor the JSON of one"),
    ({**ALPACA, "history": [["a", "b"], ["c"]]}, r"turn 2 of its history is \['c'\], not \[question, answer\]"),
    ({**ALPACA, "history": [["a", None]]}, r"turn 1 of its history is \['a', None\], not \[question, answer\]"),
    ({"prompt": [TURN], "completion": "a"}, "its 'completion' is 'a', not a list of turns nor the JSON of one"),
    ({"prompt": [TURN], "completion": [TURN]}, "turn 1 of its completion is from the user, not from the assistant.*"),
    ({"text": 3}, "it has 3 under 'text', not a string"),
]


@pytest.mark.parametrize(("record", "reason"), REFUSED)
def test_a_refusal(record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$") as raised:
        read_said(record)
    assert not isinstance(raised.value, UnknownField)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (sharegpt(*QA, notes="a"), "notes"),
        (openai(*QA, chosen="a", id=3, rejected=0), "chosen,rejected"),
        ({**sharegpt(*QA), **openai(*QA)}, "messages"),
        ({**ALPACA, "prompt": "a"}, "prompt"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system"),
        ({"text": "a", "role": "prompter", "parent_id": "b"}, "role"),
    ],
)
def test_an_unknown_field(record: Record, names: str) -> None:
    listed = ", ".join(map(repr, names.split(",")))
    with pytest.raises(UnknownField) as raised:
        read_said(record)
    assert str(raised.value) == f"it has the unknown [{listed}]: pass --ignore_fields {names}"
    assert read_said(record, ignore=frozenset(names.split(",")))


def test_reasoning_is_an_answers() -> None:
    question = {"role": "user", "content": "Why?"}
    for name in ("reasoning_content", "reasoning", "thinking"):
        answer = {"role": "assistant", "content": " So.\n", name: " Hm\n"}
        expected = (*ASKED.messages[:-1], replace(ASKED.messages[-1], reasoning=" Hm\n"))
        assert read_said({"messages": [question, answer]}) == Talk(expected)
        assert read_said({"messages": [question, answer]}, ignore=frozenset([name])) == ASKED
        assert read_said({"messages": [question, {**answer, "reasoning": " Hm\n", "thinking": ""}]}) == Talk(expected)
        for nothing in ("", " ", None):
            assert read_said({"messages": [question, {**answer, name: nothing}]}) == ASKED
        with pytest.raises(ValueError, match=rf"turn 2 of its messages has \[1\] under '{name}', not a string"):
            read_said({"messages": [question, {**answer, name: [1]}]})
        with pytest.raises(UnknownField, match=rf"turn 1 of its messages has the unknown \['{name}'\]"):
            read_said({"messages": [{**question, name: "Hm"}, answer]})
    unlike = {"role": "assistant", "content": "So.", "reasoning": "a", "thinking": "b"}
    with pytest.raises(ValueError, match="has unlike texts under 'reasoning' and 'thinking': give one"):
        read_said({"messages": [question, unlike]})


DOUBTFUL = "custom_instruction full_topic header markdown redacted subject task tokens toxic turn turns type"


@pytest.mark.parametrize("name", DOUBTFUL.split())
def test_a_field_that_may_be_text_passes_where_it_is_none(name: str) -> None:
    turn = {"from": "human", "value": "Why?"}
    for value in (None, False, True, 0, 3, 2.5, "", [], "7", "-0.5", "1e-3", "TRUE", "false"):
        assert read_said(sharegpt(*QA, **{name: value})) == ASKED
        assert read_said({"conversations": [{**turn, name: value}, {"from": "gpt", "value": " So.\n"}]}) == ASKED
    for value in ("Be brief.", "x", "3 apples", ["Why?", "So."]):
        for record in (sharegpt(*QA, **{name: value}), {**ALPACA, name: value}, {"text": "a", name.upper(): value}):
            with pytest.raises(UnknownField, match=rf"(?i)it has the unknown \['{name}'\]"):
                read_said(record)
        with pytest.raises(UnknownField, match=rf"turn 1 of its conversations has the unknown \['{name}'\]"):
            read_said({"conversations": [{**turn, name: value}]})


def test_a_misspelt_field_is_said_with_the_one_that_was_meant() -> None:
    with pytest.raises(UnknownField, match=r"the unknown \['sytem'\] \(did you mean system\?\): pass --ignore_fields"):
        read_said(sharegpt(*QA, sytem="Be brief."))


def test_an_unknown_field_of_a_turn() -> None:
    record = {"conversations": [TURN, {"from": "gpt", "value": "b", "train": False}]}
    with pytest.raises(UnknownField, match=r"^turn 2 of its conversations has the unknown \['train'\]: pass --ignore"):
        read_said(record)
    assert read_said(record, ignore=frozenset({"train"})) == talk("a", "b")


texts = st.text(max_size=12)
chats = st.tuples(
    st.none() | texts.filter(str.strip), st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=3)
)


def said_of(chat: Chat) -> Talk:
    system, turns = chat
    flat = [part for q, a, learned in turns for part in (q, (a, learned and bool(a.strip())))]
    return talk(*flat, system=system)


def turns_of(chat: Chat, speakers: tuple[Any, Any, Any], keys: tuple[str, str]) -> list[Record]:
    """The chat's turns from (system, user, assistant), with weights; the system's not where its name is None."""
    by, what = keys
    turns = [{by: speakers[0], what: chat[0], "weight": None}] if chat[0] is not None and speakers[0] else []
    for question, answer, learned in chat[1]:
        turns.append({by: speakers[1], what: question, "weight": None})
        turns.append({by: speakers[2], what: answer, "weight": int(learned)})
    return turns


def parts(turns: list[Record]) -> list[Record]:
    return [{**turn, "content": [{"type": "text", "text": part} for part in turn["content"]]} for turn in turns]


ROLES, IN_MESSAGES = ("system", "user", "assistant"), ("role", "content")
WRITERS: dict[str, Callable[[Chat], Record]] = {
    "sharegpt": lambda c: {"conversations": turns_of(c, ("system", "human", "gpt"), ("from", "value"))},
    "sharegpt with system": lambda c: {
        "conversations": turns_of(c, (None, "Human", "GPT"), ("from", "value")),
        "system": c[0],
    },
    "roles in conversations": lambda c: {"conversations": turns_of(c, ROLES, IN_MESSAGES), "idx": 3},
    "openai": lambda c: {"messages": turns_of(c, ROLES, IN_MESSAGES), "prompt": c[1][0][0]},
    "openai's parts": lambda c: {"messages": parts(turns_of(c, ROLES, IN_MESSAGES))},
    "mistral": lambda c: {"interactions": turns_of(c, (None, True, False), ("is_user", "text")), "system_prompt": c[0]},
}


@pytest.mark.parametrize("shape", WRITERS)
@settings(max_examples=60, deadline=None)
@given(chat=chats)
def test_a_chat_is_the_same_in_each_shape(shape: str, chat: Chat) -> None:
    record = WRITERS[shape](chat)
    said = said_of(chat)
    assert read_said(record) == said
    *before, last = said.messages
    unlearned = [Message(m.role, m.content, learned=m.role != "assistant") for m in before]
    assert read_said({**record, "only_last": True}) == Talk((*unlearned, last))
    if shape == "openai":
        *prompt, completion = record["messages"]
        assert read_said({"prompt": prompt, "completion": [completion]}) == Talk((*unlearned, last))


def saved(folder: Path, records: list[Record]) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records).save_to_disk(folder, num_shards=2)
    return folder


def files_of(records: list[Record], folder: Path) -> list[Path]:
    """The records in a file of each kind, and in a folder of two shards."""
    named = [folder / f"a{suffix}" for suffix in (".json", ".jsonl", ".csv", ".parquet")]
    named[0].write_text(json.dumps(records))
    named[1].write_text("\n".join(json.dumps(record) for record in records))
    with named[2].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        for record in records:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), named[3])
    return [*named, saved(folder / "saved", records)]


@pytest.mark.parametrize("shape", WRITERS)
@settings(max_examples=8, deadline=None)
@given(drawn=st.lists(chats, min_size=2, max_size=3))
def test_a_chat_is_the_same_in_each_kind_of_file(shape: str, drawn: list[Chat]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in files_of([WRITERS[shape](chat) for chat in drawn], Path(folder)):
            assert [read_said(record.value) for record in read_records(path)] == list(map(said_of, drawn))


def test_alpaca_and_text_are_the_same_in_each_kind_of_file(tmp_path: Path) -> None:
    history = [["q", "r"], ["", "日本\n"]]
    alpaca = [
        {"instruction": "a", "input": "b", "output": "c\r\n", "system": "s", "history": history, "only_last": True},
        {"instruction": "d", "input": "", "output": "e", "system": "", "history": [], "only_last": False},
    ]
    said = [Instruction("a", "b", "c\r\n", "s", (("q", "r"), ("", "日本\n")), True), Instruction("d", "", "e")]
    rest = {"alpaca": (alpaca, said), "text": ([{"text": "a,\tb"}, {"text": '"'}], [Text("", "a,\tb"), Text("", '"')])}
    for name, (records, wanted) in rest.items():
        (tmp_path / name).mkdir()
        for path in files_of(records, tmp_path / name):
            assert [read_said(record.value) for record in read_records(path)] == wanted
