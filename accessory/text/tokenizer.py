"""Text to token ids and back, with the tokenizer that lies beside a checkpoint.

A checkpoint carries either a sentencepiece model (`tokenizer.model`) or Hugging Face's pair `tokenizer.json`
and `tokenizer_config.json`. One class, `Tokenizer`, hides which: nothing else in the library asks.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

SENTENCEPIECE_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """The tokenizer of a checkpoint.

    `path` is a sentencepiece model under any name, a `tokenizer.json` with its `tokenizer_config.json` beside
    it, or a folder that holds one of the two (`tokenizer.model` wins). Attributes: `path`, the file that was
    read; `n_words`, the number of token ids, 0 to n_words - 1; `bos_id` and `eos_id`, the ids that begin and
    end a sequence.

    Raises FileNotFoundError where a file is absent and ValueError where one cannot be read; both name it.
    """

    def __init__(self, path: str | Path) -> None:
        given = Path(path)
        found = self.find(given) if given.is_dir() else given
        if found is None:
            raise FileNotFoundError(f"{given} holds neither {SENTENCEPIECE_NAME} nor {JSON_NAME}")
        self.path: Path = found
        self._backend: _SentencePiece | _Json = _Json(found) if found.suffix == ".json" else _SentencePiece(found)
        self.n_words: int = self._backend.n_words
        self.bos_id: int = self._backend.bos_id
        self.eos_id: int = self._backend.eos_id

    @staticmethod
    def find(folder: str | Path) -> Path | None:
        """The tokenizer file of a folder: `tokenizer.model` before `tokenizer.json`, None without either."""
        for name in (SENTENCEPIECE_NAME, JSON_NAME):
            if (candidate := Path(folder) / name).is_file():
                return candidate
        return None

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `text`, with the begin and end tokens where `bos` and `eos` ask for them.

        The text is taken literally: a "<s>" in it is three characters, never the control token. Raises
        TypeError for what is not a string, ValueError for a string that has no UTF-8 form.
        """
        _check_text(text)
        return [self.bos_id] * bool(bos) + self._backend.encode(text) + [self.eos_id] * bool(eos)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids that `encode` gives without begin and end, and the characters that each stands for.

        A span is begin and end in `text`, the end excluded; empty for a prefix that the text lacks. The bytes
        of a character share it, or all but the last are empty at its begin. Raises as `encode` does.
        """
        _check_text(text)
        return self._backend.encode_with_spans(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Control tokens vanish, bytes that form no character become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._backend.decode([self._checked(token_id) for token_id in ids])

    def is_control(self, token_id: int) -> bool:
        """Whether the token has no text: begin, end and the like. ValueError outside the vocabulary."""
        return self._backend.is_control(self._checked(token_id))

    def joins_next(self, token_id: int) -> bool:
        """Whether the token's text stays open until another kind of token follows it.

        The byte tokens of a `tokenizer.json` do: one wrong byte turns the whole run around it into U+FFFD,
        across control tokens too. Sentencepiece decides character by character.
        """
        return self._backend.joins_next(self._checked(token_id))

    def name(self, token_id: int) -> str:
        """The token as the vocabulary writes it, such as "▁the", "<0x0A>" or "</s>"; raises as `decode` does."""
        return self._backend.name(self._checked(token_id))

    def _checked(self, token_id: int) -> int:
        number = operator.index(token_id)
        if not self._backend.has(number):
            raise ValueError(f"token id {number} is outside 0 to {self.n_words - 1}, those of {self.path}")
        return number

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.path.absolute(),)  # `tokenizers` does not pickle encode_special_tokens

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, n_words={self.n_words})"


class _SentencePiece:
    """A sentencepiece model."""

    def __init__(self, path: Path) -> None:
        data = _read_file(path)
        advice = f"{path} is not a whole sentencepiece model: copy or download it again"
        # The format ends without a mark: a file cut off between two pieces still parses, as a smaller
        # vocabulary with default settings. The settings, fields 2 and 3, come after the pieces, field 1.
        if not {1, 2, 3} <= set(_top_level_fields(data)):
            raise ValueError(advice)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # its type differs between versions of the library
            raise ValueError(f"{advice} ({error})") from error
        self.n_words = int(self._processor.vocab_size())
        self.bos_id = int(self._processor.bos_id())
        self.eos_id = int(self._processor.eos_id())
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path} has no begin or no end token: train it with bos_id and eos_id set")

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._processor.encode(text, return_type="offset_mapping")
        return found["ids"], found["offsets"]

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids)) if ids else ""

    def has(self, token_id: int) -> bool:
        return 0 <= token_id < self.n_words

    def is_control(self, token_id: int) -> bool:
        return bool(self._processor.is_control(token_id))

    def name(self, token_id: int) -> str:
        return str(self._processor.id_to_piece(token_id))

    def joins_next(self, token_id: int) -> bool:
        return False


class _Json:
    """A `tokenizer.json`, whose begin and end tokens `tokenizer_config.json` names."""

    def __init__(self, path: Path) -> None:
        advice = f"{path} is not a tokenizer that the tokenizers library reads: copy or download it again"
        data = _read_file(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{advice} ({error})") from error
        # A file may have been saved with the limits of the run that made it, and its post-processor often
        # adds the begin token itself (it would stand there twice) or takes white space out of the spans.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.post_processor = None
        self._tokenizer.encode_special_tokens = True  # "<s>" in a text is text
        self._names = {token_id: name for name, token_id in self._tokenizer.get_vocab().items()}
        if not self._names:
            raise ValueError(advice)
        self.n_words = max(self._names) + 1
        self.bos_id, self.eos_id = self._named_tokens(path.with_name(CONFIG_NAME), ("bos_token", "eos_token"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {i for i, token in added.items() if token.special} | {self.bos_id, self.eos_id}

    def _named_tokens(self, path: Path, keys: Sequence[str]) -> Iterator[int]:
        data = _read_file(path)
        try:
            config: Any = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: copy or download it again ({error})") from error
        for key in keys:
            value = config.get(key) if isinstance(config, dict) else None
            name = value.get("content") if isinstance(value, dict) else value
            if not isinstance(name, str):
                raise ValueError(f"{path} names no {key}: add one of the tokens of {JSON_NAME} there")
            token_id = self._tokenizer.token_to_id(name)
            if token_id is None:
                raise ValueError(f"{path}: correct {key}, {name!r} is no token of the {JSON_NAME} beside it")
            yield token_id

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: list[int]) -> str:
        visible = [token_id for token_id in ids if token_id not in self._control]
        return str(self._tokenizer.decode(visible, skip_special_tokens=False))

    def has(self, token_id: int) -> bool:
        return token_id in self._names

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control

    def name(self, token_id: int) -> str:
        return self._names[token_id]

    def joins_next(self, token_id: int) -> bool:
        # Control tokens are left out before the bytes are joined, so they do not part a run.
        return token_id in self._control or _BYTE_TOKEN.fullmatch(self._names[token_id]) is not None


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"encode takes a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = f"{text[error.start]!r} at character {error.start}"
        raise ValueError(f"the text holds a lone surrogate, {at}: decode its source with errors='replace'") from error


def _read_file(path: Path) -> bytes:
    """The bytes of a file that may be there in name only."""
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {path}: check the path")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: copy or download it again")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder")
    return data


def _top_level_fields(data: bytes) -> Iterator[int]:
    """A protobuf message's field numbers, until one is not length-delimited or would run past the end."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while at < len(data) and shift < 64:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value, at
        return 0, len(data) + 1

    at = 0
    while at < len(data):
        tag, at = varint(at)
        size, at = varint(at)
        at += size
        if tag & 7 != 2 or at > len(data):
            return
        yield tag >> 3
