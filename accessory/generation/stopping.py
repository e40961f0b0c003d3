"""Tokens to text, one at a time, up to a stop string.

Two things keep a token's text from being shown at once. It may end within a character, whose other bytes are
in the tokens to come; or its end may be the beginning of a stop string. What is shown is never taken back,
and at the end it is what the tokenizer makes of all tokens together, up to the stop string.
"""

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


class TextStream:
    """The text of one growing completion.

    `push` each token, read `text`, end when `stopped`, and call `finish` after the last token. `stop` are the
    strings that end the text; it is cut before the one that begins first, whatever tokens it came in. A token
    costs the time of its own characters times the number of stop strings, however long the text has grown.

    With ``after``, tokens of a text that this one goes on from, a space before the first word is kept, and bytes of
    a character that was begun there join. Without it the first word has no space, as a text's first has none.

    Example: with stop ("\\n###",), the tokens "Hi", "\\n", "##" show "Hi", "Hi", "Hi"; then "#" sets
    `stopped`, while "!" would have shown "Hi\\n##!".

    Raises ValueError for an empty stop string, or one string in place of a sequence of them.
    """

    def __init__(self, tokenizer: StreamableTokenizer, stop: Sequence[str] = (), *, after: Sequence[int] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(item, str) and item for item in stop):
            raise ValueError(f"stop takes a sequence of strings, none of them empty, not {stop!r}")
        self._decoder = _Decoder(tokenizer, after)
        self._search = _StopSearch(stop)
        self._text = ""
        self._fresh: list[str] = []  # shown since `text` was last read: joined only then
        self._finished = False

    @property
    def text(self) -> str:
        """What may be shown now. It grows at its end only."""
        if self._fresh:
            self._text += "".join(self._fresh)
            self._fresh.clear()
        return self._text

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. The text is complete then, and further tokens are ignored."""
        return self._search.found

    def push(self, token_id: int) -> None:
        """Take the next token. ValueError for an id outside the vocabulary, and after `finish`."""
        if self._finished:
            raise ValueError("the text is finished: make a new TextStream for another completion")
        if not self._search.found:
            self._show(self._search.push(self._decoder.push(token_id)))

    def finish(self) -> str:
        """The whole text, now that no more tokens come: what was held back is part of it."""
        if not self._finished and not self._search.found:
            self._show(self._search.push(self._decoder.finish()))
            self._show(self._search.finish())
        self._finished = True
        return self.text

    def _show(self, text: str) -> None:
        if text:
            self._fresh.append(text)


def _open(text: str) -> int:
    """How many characters at a text's end may stand for bytes of one that is not complete."""
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_OPEN)


class _Decoder:
    """Gives each token's text as soon as no later token can change it.

    A tokenizer's text for some tokens depends on their neighbours: bytes join into characters, and the first
    word loses its space. So a short window of tokens is decoded again with each new one. It begins with
    tokens that are already shown and have some text, as many as it takes: thus they are what stands first,
    and the rest reads as it would in the whole text.
    """

    def __init__(self, tokenizer: StreamableTokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were returned
        self._after_control = True
        if after:
            self._go_on_from(after)

    def push(self, token_id: int) -> str:
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


class _StopSearch:
    """Finds the stop string that begins first, and holds back what may still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._matchers = [_Matcher(item) for item in dict.fromkeys(stop)]
        self._held = ""
        self._length = 0  # of all text so far, held or not, in characters
        self._start: int | None = None  # of the first stop string that is complete, in the same count

    def push(self, text: str) -> str:
        """The text that may be shown, after `text` was added."""
        if not self._matchers:
            return text
        shown = self._length - len(self._held)
        self._held += text
        earliest = shown  # the first place where a stop string begins, or may begin
        for character in text:
            self._length += 1
            earliest = self._length
            for matcher in self._matchers:
                if matcher.push(character):
                    start = self._length - matcher.size
                    self._start = start if self._start is None else min(self._start, start)
                earliest = min(earliest, self._length - matcher.matched)
            # A longer stop string that began before this one, and may yet be completed, goes first.
            if self._start is not None and self._start <= earliest:
                self.found = True
                earliest = self._start
                break
        return self._release(earliest - shown)

    def finish(self) -> str:
        """The rest of the text, now that nothing follows."""
        if self.found:
            return ""
        if self._start is None:
            return self._release(len(self._held))
        self.found = True
        return self._release(self._start - (self._length - len(self._held)))

    def _release(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown


class _Matcher:
    """Looks for one string, a character at a time (Knuth, Morris, Pratt: no character is compared again)."""

    def __init__(self, pattern: str) -> None:
        self.size = len(pattern)
        self.matched = 0  # length of the longest beginning of the pattern that the text ends in
        self._pattern = pattern
        self._border = [0]  # for each length: the next shorter beginning that is also its end
        for character in pattern[1:]:
            border = self._border[-1]
            while border and pattern[border] != character:
                border = self._border[border - 1]
            self._border.append(border + (pattern[border] == character))

    def push(self, character: str) -> bool:
        """Whether the pattern ends with this character."""
        while self.matched and self._pattern[self.matched] != character:
            self.matched = self._border[self.matched - 1]
        self.matched += self._pattern[self.matched] == character
        complete = self.matched == self.size
        if complete:
            self.matched = self._border[-1]
        return complete
