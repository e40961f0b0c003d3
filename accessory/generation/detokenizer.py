"""Tokens to text, one at a time, each as soon as no later one changes what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished character to
# A UTF-8 character has at most 4 bytes, so 3 may wait for the last, each of them at most one U+FFFD.
_MAX_OPEN = 3
# While a text ends in U+FFFD its tokens cannot be let go. Past this many, only the last ones are kept.
_MAX_WINDOW = 32


class StreamableTokenizer(Protocol):
    """What a text is made with. `accessory.text.tokenizer.Tokenizer` has it."""

    def decode(self, ids: Sequence[int]) -> str: ...
    def is_control(self, token_id: int) -> bool: ...
    def joins_next(self, token_id: int) -> bool: ...


def settled_text(tokenizer: StreamableTokenizer, ids: Sequence[int]) -> str:
    """The text of tokens as far as no further token changes it: without the bytes of an unfinished character."""
    text = tokenizer.decode(ids)
    if not (opened := _open(text)):
        return text
    last = len(ids)
    while last and tokenizer.joins_next(ids[last - 1]):
        last -= 1
    return text[:-opened] if last == len(ids) else tokenizer.decode(ids[:last])


def _open(text: str) -> int:
    """How many characters at a text's end may stand for bytes of one that is not complete."""
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_OPEN)


class Detokenizer:
    """Gives each token's text as soon as no later token can change it.

    A tokenizer's text for some tokens depends on their neighbours: bytes join into characters, and the first
    word loses its space. So a short window of tokens is decoded again with each new one. It begins with
    tokens that are already shown and have some text, as many as it takes: thus they are what stands first,
    and the rest reads as it would in the whole text.

    Args:
        after: tokens of a text that this one goes on from. Behind their `settled_text` it makes up the text of all
            tokens: a space before the first word is kept, and bytes of a character that was begun there join.
    """

    def __init__(self, tokenizer: StreamableTokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were returned
        self._after_control = True
        if after:
            self._go_on_from(after)

    def push(self, token_id: int) -> str:
        """The text that is settled by a further token. ValueError for an id outside the vocabulary."""
        control = self._tokenizer.is_control(token_id)
        # A control token matters once, by parting the bytes before and after it; a run adds nothing.
        if control and self._after_control:
            return ""
        self._after_control = control
        self._window.append(token_id)
        if self._tokenizer.joins_next(token_id):
            return ""
        text = self._tokenizer.decode(self._window)
        opened = _open(text)
        fresh = text[self._given : len(text) - opened]
        self._given = max(self._given, len(text) - opened)
        if not opened:
            self._keep(1)
        elif len(self._window) > _MAX_WINDOW:
            self._keep(_MAX_WINDOW // 2, opened=opened)
        return fresh

    def finish(self) -> str:
        """The rest of the text, now that no more tokens come."""
        text = self._tokenizer.decode(self._window) if self._window else ""
        return text[self._given :]

    def _go_on_from(self, tokens: Sequence[int]) -> None:
        """Begin behind these, with as many of them in the window as have some text."""
        count = _MAX_WINDOW // 2
        while not (settled := settled_text(self._tokenizer, tokens[-count:])) and count < len(tokens):
            count *= 2
        self._window, self._given = list(tokens[-count:]), len(settled)
        self._after_control = self._tokenizer.is_control(tokens[-1])

    def _keep(self, count: int, *, opened: int = 0) -> None:
        """Let go all but the last `count` tokens, or more where these have no text of their own."""
        while count < len(self._window):
            if text := self._tokenizer.decode(self._window[-count:]):
                self._window = self._window[-count:]
                self._given = len(text) - opened
                return
            count *= 2
