"""The elements of a large JSON list, one after another.

A data file of a gigabyte would take several as Python objects, on every host; read so, it takes a record's worth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")
# The parser names the place where it gave up. If that is this close to the end of what was read, the text
# may be right and only cut: the longest thing it takes as a whole is "-Infinity" or "\ud83d\ude00".
_NEAR_END = 16


def json_list(file: IO[str], path: Path, *, chunk: int = _CHUNK) -> Iterator[Any]:
    """The elements of the list that `file` holds; `path` is for messages, `chunk` the characters of one read.

    Raises ValueError, with the line, where the text is not a list of JSON values and nothing else.
    """
    window = _Window(file, path, chunk)
    first = window.peek()
    if first != "[":
        hint = "; if each of its lines is a record, name it .jsonl" if first == "{" else ""
        raise window.error(f"it is not a list of records{hint}")
    window.at += 1
    if window.peek() == "]":
        window.at += 1
    else:
        while True:
            yield window.value()
            after = window.peek()
            window.at += 1
            if after == "]":
                break
            if after != ",":
                window.at -= 1
                reason = f"',' or ']' must stand before {after!r}" if after else "it ends inside the list"
                raise window.error(reason)
    if rest := window.peek():
        raise window.error(f"{rest!r} stands after the list")


class _Window:
    """What was read of a file and is not parsed yet: `text` from `at` on."""

    def __init__(self, file: IO[str], path: Path, chunk: int) -> None:
        self._file, self._path, self._chunk = file, path, chunk
        self._decoder = json.JSONDecoder()
        self._line = 1  # of text[0]
        self._ended = False
        self.text = ""
        self.at = 0

    def peek(self) -> str:
        """The next character that is not white space, "" at the end; `at` is then its place."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches anywhere
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The JSON value that begins at the next character; `at` is then its end."""
        if not self.peek():
            raise self.error("it ends inside the list")
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _NEAR_END
                if cut and self._more():
                    continue
                if cut and self._ended and error.msg.startswith("Unterminated string"):
                    raise self.error("it ends inside a string", error.pos) from error
                raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a number too long for Python, or too deep a nesting
                raise self.error(str(error)) from error
            # A number may go on after what was read: "1" as "1.5".
            if not isinstance(value, int | float) or end < len(self.text) - _NEAR_END or not self._more():
                self.at = end
                return value

    def error(self, reason: str, at: int | None = None) -> ValueError:
        """A ValueError that names the file and the line of `at`, by default the present place."""
        line = self._line + self.text.count("\n", 0, self.at if at is None else at)
        return ValueError(
            f"{self._path}, line {line}: not a valid .json data file: {reason}; correct it or copy it again"
        )

    def _more(self) -> bool:
        """Read on and forget what was parsed. False at the end of the file."""
        if self._ended:
            return False
        try:
            # As much as is there already: a value of many chunks is then parsed again only a few times.
            more = self._file.read(max(self._chunk, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            reason = f"it is not UTF-8 text ({error.reason}): convert it"
            raise self.error(reason, len(self.text)) from error
        if not more:
            self._ended = True
            return False
        self._line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + more, 0
        return True
