"""What a single token says: its part of a text, as characters and as bytes."""

import re
from dataclasses import dataclass

from accessory.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\ufffd"


@dataclass(frozen=True)
class TokenText:
    """A token's part of a text.

    Attributes:
        text: its characters, with the space before a word; the vocabulary's name ("</s>", "<0xE4>") of a token
            that has none of its own, and "<id>" outside the vocabulary.
        data: its bytes, UTF-8; empty for control tokens, None where the vocabulary does not tell.
        size: how many bytes of a text it stands for.
    """

    text: str
    data: bytes | None
    size: int


class TokenTexts:
    """The texts of a tokenizer's tokens, each made once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}
        # A token that stands first loses its space, so each is decoded behind this one.
        self._before = tokenizer.encode("a", bos=False, eos=False)
        self._skipped = len(tokenizer.decode(self._before))

    def __getitem__(self, token: int) -> TokenText:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._make(token)
        return found

    def leading(self, token: int) -> TokenText:
        """The token where it begins a text, which has no space before its first word."""
        made = self[token]
        if not made.data or made.text != " " + self._tokenizer.decode([token]):
            return made
        return TokenText(made.text[1:], made.data[1:], made.size - 1)

    def _make(self, token: int) -> TokenText:
        try:
            name = self._tokenizer.name(token)
        except ValueError:  # a model may have more rows than its tokenizer has tokens
            return TokenText(f"<{token}>", None, 0)
        if self._tokenizer.is_control(token):
            return TokenText(name, b"", 0)
        if byte := _BYTE.fullmatch(name):
            data = bytes.fromhex(byte[1])
            return TokenText(data.decode() if data < b"\x80" else name, data, 1)
        text = self._tokenizer.decode([*self._before, token])[self._skipped :]
        if _BROKEN in text:  # a part of a character in a vocabulary of bytes, whose names write each as one letter
            return TokenText(name, None, len(name))
        return TokenText(text, text.encode(), len(text.encode()))
