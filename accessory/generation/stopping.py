"""Tokens to text, one at a time, up to a stop string.

Two things keep a token's text from being shown at once. It may end within a character, whose other bytes are
in the tokens to come (see detokenizer.py); or its end may be the beginning of a string that is cut off. What is shown
is never taken back, and at the end it is what the tokenizer makes of all tokens together, without what was cut off.
"""

from __future__ import annotations

from collections.abc import Sequence

from accessory.generation.detokenizer import Detokenizer, StreamableTokenizer


class TextStream:
    """The text of one growing completion.

    `push` each token, read `text`, end when `stopped`, and call `finish` after the last token. A token costs the time
    of its own characters times the number of stop strings, however long the text has grown.

    Args:
        stop: strings that end the text; it is cut before the one that begins first, whatever tokens it came in.
        after: the prompt's tokens. The text is what comes behind theirs: a space before the first word is kept, and
            bytes of a character that was begun there join. Behind control tokens alone the first word has no space,
            as a text's first has none.
        lead: taken away once where the text begins with it, before stop strings are looked for.
        tail: taken away once where the text ends with it and a token, not its length or a stop string, ended it.

    Example: with stop ("\\n###",), the tokens "Hi", "\\n", "##" show "Hi", "Hi", "Hi"; then "#" sets
    `stopped`, while "!" would have shown "Hi\\n##!".

    Raises ValueError for an empty stop string, or one string in place of a sequence of them.
    """

    def __init__(
        self,
        tokenizer: StreamableTokenizer,
        stop: Sequence[str] = (),
        *,
        after: Sequence[int] = (),
        lead: str = "",
        tail: str = "",
    ) -> None:
        if isinstance(stop, str) or not all(isinstance(item, str) and item for item in stop):
            raise ValueError(f"stop takes a sequence of strings, none of them empty, not {stop!r}")
        self._decoder = Detokenizer(tokenizer, after)
        self._lead, self._search, self._tail = _Lead(lead), _StopSearch(stop), _Tail(tail)
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
        if not self._search.found and (text := self._lead.push(self._decoder.push(token_id))):
            self._show(self._tail.push(self._search.push(text)))
            if self._search.found:
                self._show(self._tail.finish(cut=False))

    def finish(self, *, ended: bool = False) -> str:
        """The whole text, now that no more tokens come: what was held back is part of it, but for the tail.

        Args:
            ended: by a token, which was not pushed.
        """
        if not self._finished and not self._search.found:
            text = self._lead.push(self._decoder.finish()) + self._lead.finish()
            self._show(self._tail.push(self._search.push(text) + self._search.finish()))
            self._show(self._tail.finish(cut=ended and not self._search.found))
        self._finished = True
        return self.text

    def _show(self, text: str) -> None:
        if text:
            self._fresh.append(text)


class _Lead:
    """Takes a string away from a text's beginning, and holds back what may still become it."""

    def __init__(self, lead: str) -> None:
        self._lead = lead  # "" from when it is decided
        self._held = ""

    def push(self, text: str) -> str:
        """The text that goes on, after `text` was added."""
        if not self._lead:
            return text
        self._held += text
        if len(self._held) < len(self._lead) and self._lead.startswith(self._held):
            return ""
        lead = self._lead
        return self.finish().removeprefix(lead)

    def finish(self) -> str:
        """What was held back, now that it is decided."""
        held, self._held, self._lead = self._held, "", ""
        return held


class _Tail:
    """Takes a string away from a text's end, and holds back what may be it, whole or begun."""

    def __init__(self, tail: str) -> None:
        self._tail = tail
        self._matcher = _Matcher(tail) if tail else None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown, after `text` was added."""
        if self._matcher is None or not text:
            return text
        for character in text:
            complete = self._matcher.push(character)
        held = self._matcher.size if complete else self._matcher.matched
        text = self._held + text
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self, *, cut: bool) -> str:
        """The rest of the text, now that nothing follows; `cut`: without the tail."""
        held, self._held = self._held, ""
        return "" if cut and held == self._tail else held


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
