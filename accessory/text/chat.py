"""What a chat is made of, and where an answer to it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; `learned` says whether training learns it, where it is the assistant's."""

    role: Role
    content: str
    name: str | None = None
    learned: bool = True


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
