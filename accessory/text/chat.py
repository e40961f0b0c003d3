"""What a chat is made of, where an answer to it ends, and the pieces of text that both become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from accessory.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
Before = Literal["start", "cont", "behind"]
_WINDOW = 256  # tokens; nothing in a text reaches further back


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat.

    `learned` says whether training learns it, where it is the assistant's. `given` is an instruction's input, for
    which Alpaca's form has a place of its own; elsewhere it follows the content on a new line. `reasoning` is what the
    assistant thought before it said this: chat templates of models that reason have a place for it.
    """

    role: Role
    content: str
    name: str | None = None
    learned: bool = True
    given: str = ""
    reasoning: str = ""

    @property
    def text(self) -> str:
        return f"{self.content}\n{self.given}" if self.given.strip() else self.content

    @property
    def taught(self) -> bool:
        """Whether training learns it: an answer that says something."""
        return self.role == "assistant" and self.learned and bool(self.content.strip())


@dataclass(frozen=True, slots=True)
class Ends:
    """Where an answer ends, and what of the text that a model writes is the form's and not the answer's.

    Attributes:
        stop: strings that end it and are cut off.
        stop_ids: tokens that end it, beside the tokenizer's own end tokens.
        lead: taken away once where the text begins with it.
        tail: taken away once where a token ended the text and it ends so.
    """

    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    lead: str = ""
    tail: str = ""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a chat's text that is tokenised by itself: between two of them no token reaches over.

    So an answer has the tokens that a model gives which was asked the question. `how` says what stands before a text:
    "start" nothing (tokenizers put a prefix there), "cont" other text, "behind" a control token that a template wrote.
    A segment with a `control` is that token, and `text` its name.
    """

    text: str
    learned: bool = False
    how: Before = "cont"
    control: int | None = None

    @property
    def unlearned(self) -> Segment:
        return replace(self, learned=False)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids; ValueError for a lone surrogate."""
        if self.control is not None:
            return [self.control]
        if self.how == "start":
            return tokenizer.encode(self.text, bos=False, eos=False)
        return (tokenizer.cont if self.how == "cont" else tokenizer.after_control)(self.text)


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and which of them a model learns."""

    tokens: list[int]
    learned: list[bool]


def ids_of(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[int]:
    """The token ids of segments in a row."""
    return [token for segment in segments for token in segment.encode(tokenizer)]


def encode_example(segments: Sequence[Segment], tokenizer: Tokenizer) -> Example:
    """The same, with what of it is learned.

    Raises ValueError where a learned text would not come back: decode(before + it) must be decode(before) + it.
    """
    parts = [segment.encode(tokenizer) for segment in segments]
    tokens = [token for part in parts for token in part]
    learned = [segment.learned for segment, part in zip(segments, parts, strict=True) for _ in part]
    begins = [place for place, segment in enumerate(segments) if segment.how == "start"]
    for begin, end in pairwise([0, *begins[1:], len(segments)]):  # each of these texts begins with a prefix
        text = "".join(segment.text for segment in segments[begin:end] if segment.control is None)
        said = tokenizer.decode([token for part in parts[begin:end] for token in part])
        if said not in (text, text.removeprefix(" ")):  # some tokenizers change more of a text than its first space
            _check_learned(segments[begin:end], parts[begin:end], tokenizer)
    return Example(tokens, learned)


def _check_learned(segments: Sequence[Segment], parts: Sequence[list[int]], tokenizer: Tokenizer) -> None:
    before: list[int] = []
    for segment, part in zip(segments, parts, strict=True):
        text = segment.text
        if segment.learned and segment.control is None:
            before = before[-_WINDOW:]  # so that long chats cost no more for each answer
            said = tokenizer.decode(before)
            prefixed = [f"{said} {text}"] if segment.how == "behind" else []  # as where a text begins
            if tokenizer.decode([*before, *part]) not in (said + text, *prefixed):
                cut = f"{text[:40]!r}..." if len(text) > 40 else repr(text)
                raise ValueError(f"its answer {cut} does not come back from the tokenizer's ids: it cannot be learned")
        before += part
