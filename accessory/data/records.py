"""What a record of a data file says, whatever shape it has; its fields tell which, so that no setting need name it.

Nothing is stripped or put into a prompt here. Every refusal is a ValueError with the reason, without file or line.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from accessory.errors import nearest, shown, shown_keys
from accessory.text.chat import Message, Role

SHAPES = (
    '{"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}, {"interactions": '
    '[{"is_user", "text"}]}, {"instruction", "input", "output"}, {"prompt", "completion"} and {"text"}'
)
_RAW = (("text",), ("content",))  # a shape is told by fields that have to be there
_CHATS = (("conversations",), ("messages",), ("interactions",), ("conversation",))
_INSTRUCTION, _COMPLETION = ("instruction", "output"), ("prompt", "completion")
_SYSTEM = ("system", "system_prompt")
# Beside a shape's own; some say once more what it says: the first question in ultrachat, the whole in alpaca-gpt4.
_BESIDE = {("messages",): ("prompt",), _INSTRUCTION: ("input", "history", "text")}
_SPEAKER, _CONTENT = ("from", "role", "is_user"), ("value", "content", "text")  # of a turn
_TURN = (*_SPEAKER, *_CONTENT, "name", "weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")  # of an answer
# Of which somebody may have meant one.
_FIELDS: tuple[str, ...] = ("conversations", "messages", "interactions", *_INSTRUCTION, "input", "history")
_FIELDS += (*_COMPLETION, *_SYSTEM, *_SPEAKER, *_CONTENT, *_REASONING, "weight", "only_last")
_NOTHING: tuple[Any, ...] = ("", [], {}, "null", "[]", "{}")  # also as a CSV file has it

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_IS_USER: dict[str, Role] = {"true": "user", "false": "assistant"}
_TOOLS = "tools functions available_tools tool_calls function_call tool_call_id tool function tool_call observation"
_MEDIA = "image images video videos audio audios"
_REFUSED = dict.fromkeys(_TOOLS.split(), "the use of tools cannot be trained on")  # fields and roles
_REFUSED |= dict.fromkeys(_MEDIA.split(), "only text can be trained on")
_BOOKKEEPING = """
    __index_level_0__ _id avatarurl categories category conversation_hash conversation_id country created created_at
    created_date dataset dataset_name date detoxify_moderation difficulty domain dump file_path hash hashed_ip id idx
    index lang language language_score length license message_id meta metadata model model_name num_tokens num_turns
    openai_moderation origin original_index parent_id prompt_id quality score skip_prompt_formatting source
    source_dataset split state subset synthetic tags task_id task_name task_type time timestamp title token_count topic
    turn_identifier updated_at url user_id uuid version views"""
# Under these others have text to learn or to ask: a switch or a number passes, and the headers of a request.
_DOUBTFUL = "custom_instruction full_topic header markdown redacted subject task tokens toxic turn turns type"
_BOOKS, _UNLESS_TEXT = frozenset(_BOOKKEEPING.split()), frozenset(_DOUBTFUL.split())
_NUMBER = re.compile(r"true|false|[-+.\d]+(e[-+]?\d+)?", re.IGNORECASE)  # as a CSV file has it


@dataclass(frozen=True, slots=True)
class Talk:
    """Questions and answers in turn, with system messages; it ends with an answer, and empty ones are not learned."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """An Alpaca record; `given` is its "input". The answers of its `history` are learned too, unless `only_last`."""

    instruction: str
    given: str
    output: str
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    only_last: bool = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The same as a talk."""
        said = [] if self.system is None else [Message("system", self.system)]
        for question, answer in self.history:
            said += [Message("user", question), Message("assistant", answer, learned=not self.only_last)]
        return (*said, Message("user", self.instruction, given=self.given), Message("assistant", self.output))


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text: `completion` is learned, and where `prompt` is empty that is all of it."""

    prompt: str
    completion: str


Said = Talk | Instruction | Text


class OtherShape(ValueError):
    """A record is whole and yet not what is read: most of its file will be so, and correcting this one is no cure.

    Attributes:
        cure: what to do about it.
    """

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.cure = cure


@dataclass(eq=False)
class UnknownField(ValueError):
    """A record has fields with values that are none of its shape's and no bookkeeping."""

    where: str
    names: Sequence[str]

    def __str__(self) -> str:
        flag = shown(",".join(self.names), most=1000)[1:-1]
        misspelt = (nearest(name, _FIELDS, likeness=0.8) for name in self.names[:20] if name not in _FIELDS)
        meant = next(filter(None, misspelt), "")
        return f"{self.where} has the unknown {shown(self.names, most=200)}{meant}: pass --ignore_fields {flag}"


def read_said(value: Any, *, ignore: frozenset[str] = frozenset()) -> Said:
    """What the record `value` says; the fields named in `ignore` are passed over, in its turns as well.

    Raises UnknownField, OtherShape for a record of no known shape, and ValueError for one with a fault.
    """
    cure = "give its fields the names of one of these shapes"
    if not isinstance(value, dict):
        raise OtherShape(f"it is {shown(value)}, not an object of a known shape, which are {SHAPES}", cure)
    record = _given(value, ignore)
    present = [shape for shape in (*_CHATS, _INSTRUCTION, _COMPLETION, *_RAW) if record.keys() >= set(shape)]
    if not present:
        raise OtherShape(f"it is of no known shape, having {shown_keys(record)}; known are {SHAPES}", cure)
    # A table of several shapes' records has the columns of all, empty where a record is of another shape.
    shape = next((shape for shape in present if any(map(record.get, shape))), present[0])
    if shape in _RAW or (shape == _COMPLETION and all(isinstance(record[name], str) for name in shape)):
        _refuse_unknown(record, shape, "it")
        return Text(_string(record, "prompt"), _string(record, shape[-1]))
    _refuse_unknown(record, (*shape, *_BESIDE.get(shape, ()), *_SYSTEM, "only_last"), "it")
    only_last = str(record.get("only_last") or False).lower()  # a CSV file's is a string
    if only_last not in ("true", "false"):
        raise ValueError(f"its 'only_last' is {shown(record['only_last'])}: give true or false")
    if shape == _INSTRUCTION:
        instruction, given, output = (_string(record, name) for name in ("instruction", "input", "output"))
        return Instruction(instruction, given, output, _system(record), _history(record), only_last == "true")
    placed = [turn for name in shape for turn in _turns(record, name, ignore)]
    _refuse_disorder(placed)
    messages = _with_system([message for _, message in placed], _system(record))
    while messages and messages[-1].role != "assistant":  # a question that nobody answers
        messages.pop()
    if only_last == "true":
        messages[:-1] = map(_unlearned, messages[:-1])
    return Talk(tuple(messages))


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages without empty ones from the system, and `system` before them unless they have it."""
    messages = [message for message in messages if message.role != "system" or message.content.strip()]
    own = next((message.content for message in messages if message.role == "system"), None)
    if system is None or own == system:
        return messages
    if own is not None:
        raise ValueError(f"its system message {shown(system)} is not that of its turns, {shown(own)}")
    return [Message("system", system), *messages]


def _unlearned(message: Message) -> Message:
    return replace(message, learned=message.role != "assistant")


def _turns(record: dict[str, Any], name: str, ignore: frozenset[str]) -> list[tuple[str, Message]]:
    """The messages under `name`, each with its place."""
    read = []
    for number, turn in enumerate(_list(record, name), start=1):
        place = f"turn {number} of its {name}"
        if isinstance(turn, str):  # LIMA's are bare strings
            turn = {"is_user": number % 2 == 1, "text": turn}
        if not isinstance(turn, dict):
            raise ValueError(f"{place} is {shown(turn)}, not an object")
        message = _message(_given(turn, ignore), place)
        read.append((place, _unlearned(message) if name == "prompt" else message))
    return read


def _message(turn: dict[str, Any], place: str) -> Message:
    _refuse_unknown(turn, (*_TURN, *_REASONING), place)
    speaker, said = _one_of(turn, _SPEAKER, place), _one_of(turn, _CONTENT, place)
    word = str(turn[speaker]).strip().lower()
    role = (_IS_USER if speaker == "is_user" else _ROLES).get(word)
    if role is None:
        reason = _REFUSED.get(word, "it takes system, user (or human) or assistant (or gpt), is_user true or false")
        raise ValueError(f"{place} has {shown(turn[speaker])} under {speaker!r}: {reason}")
    if role != "assistant":
        _refuse_unknown(turn, _TURN, place)
    weight, name = turn.get("weight", 1), _string(turn, "name", place)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{place} has the weight {shown(weight)}: give 1, or 0 for what is not to be learned")
    content = _content(turn[said], f"under {said!r} {place} has")
    learned = role != "assistant" or (weight == 1 and bool(content.strip()))
    return Message(role, content, name or None, learned, reasoning=_reasoning(turn, place))


def _reasoning(turn: dict[str, Any], place: str) -> str:
    given = {text: name for name in _REASONING if (text := _string(turn, name, place)).strip()}
    if len(given) > 1:
        raise ValueError(f"{place} has unlike texts under {' and '.join(map(repr, given.values()))}: give one")
    return next(iter(given), "")


def _content(said: Any, where: str) -> str:
    """A string, or a list of {"type": "text", "text"}, joined as they are."""
    texts = []
    for part in said if isinstance(said, list) else [said]:
        given = _given(part) if isinstance(part, dict) else {"type": "text", "text": part}
        if given.keys() != {"type", "text"} or given["type"] != "text" or not isinstance(given["text"], str):
            raise ValueError(f"{where} {shown(part)}, and only text can be trained on")
        texts.append(given["text"])
    return "".join(texts)


def _refuse_disorder(placed: Sequence[tuple[str, Message]]) -> None:
    speakers = [(place, message.role) for place, message in placed if message.role != "system"]
    for (place, role), due in zip(speakers, itertools.cycle(("user", "assistant")), strict=False):
        if role != due:
            rule = "user and assistant must alternate, and the user begins"
            raise ValueError(f"{place} is from the {role}, not from the {due}: {rule}")


def _refuse_unknown(fields: dict[str, Any], known: Sequence[str], where: str) -> None:
    said = [name for name, value in fields.items() if not _is_nothing(value) and name not in known]
    unknown = [name for name in said if not _keeps_books(name.lower(), fields[name])]
    for name in unknown:
        if name in _REFUSED:
            raise ValueError(f"{where} has {shown(fields[name])} under {name!r}: {_REFUSED[name]}")
    if unknown:
        raise UnknownField(where, unknown)


def _is_nothing(value: Any) -> bool:
    """Also a struct of a table, whose parts are all empty."""
    return value in _NOTHING or value is None or (isinstance(value, dict) and all(map(_is_nothing, value.values())))


def _keeps_books(name: str, value: Any) -> bool:
    if name not in _UNLESS_TEXT:
        return name in _BOOKS or not name  # the column that pandas numbers rows in
    return _NUMBER.fullmatch(value) is not None if isinstance(value, str) else not isinstance(value, list)


def _given(fields: dict[str, Any], ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None and name not in ignore}


def _one_of(turn: dict[str, Any], names: Sequence[str], place: str) -> str:
    found = [name for name in names if turn.get(name, "") != ""] or [name for name in names if name in turn][:1]
    if len(found) != 1:
        raise ValueError(f"{place} has {' and '.join(map(repr, found)) or 'none'} of {', '.join(names)}: give one")
    return found[0]


def _history(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    pairs = _list(record, "history") if record.get("history", []) not in _NOTHING else []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"turn {number} of its history is {shown(pair)}, not [question, answer]")
    return tuple((question, answer) for question, answer in pairs)


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record[name]
    if isinstance(value, str):  # a field of a CSV file
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"its {name!r} is {shown(value)}, not a list of turns nor the JSON of one")
    return value


def _string(fields: dict[str, Any], name: str, where: str = "it") -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{where} has {shown(value)} under {name!r}, not a string")
    return value


def _system(record: dict[str, Any]) -> str | None:
    given = [text for name in _SYSTEM if (text := _string(record, name)).strip()]
    if len(set(given)) > 1:
        raise ValueError(f"its 'system' and 'system_prompt' differ: {shown(given[0])} and {shown(given[1])}")
    return given[0] if given else None


def digest_of(value: Any, *, ignore: frozenset[str] = frozenset()) -> int:
    """64 bits of what a record says: equal for equal content, whatever its shape, file, form or bookkeeping.

    Raises:
        ValueError: as `read_said`.
    """
    said = read_said(value, ignore=ignore)
    if isinstance(said, Text):
        content = [["", said.prompt], ["", said.completion]]
    else:
        content = [[message.role, message.text] for message in said.messages]
    return int.from_bytes(hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest(), "little")
