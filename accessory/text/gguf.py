"""What a GGUF file says of text: its tokenizer, as a sentencepiece model and back, and its chat templates.

Its tokenizer "llama" is a sentencepiece model of byte-pair merges in other words: pieces, scores and types, the
numbers of these the same. So the model is put together again, and read as any other. The fields' numbers are those of
sentencepiece_model.proto. The tokenizer "gpt2" is in `accessory.text.gguf_merges`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from accessory.errors import shown
from accessory.gguf_header import SUFFIX, are_one, folder_of, read_header, set_of
from accessory.text import gguf_merges
from accessory.text.gguf_tokens import (
    BYTE,
    CONTROL,
    KEY,
    MORE_ENDS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    numbers_of,
    pad_name,
    token_of,
    types_of,
)

_NONE = ("none", "no_vocab")
_TEMPLATE = "tokenizer.chat_template"
# Scores of what was added to a model, and of the rows of a padded vocabulary; as llama.cpp's converter has them.
_ADDED_SCORE, _PAD_SCORE = -1000.0, -10000.0


class Written(gguf_merges.Written, Protocol):
    """What is asked of a tokenizer that is written, which `accessory.text.tokenizer.Tokenizer` answers."""

    @property
    def is_json(self) -> bool: ...

    @property
    def sentencepiece_model(self) -> bytes: ...


def find_gguf(place: Path) -> Path | None:
    """The GGUF file that says what is asked here of a folder or of one of its files: the first of a split set."""
    folder = folder_of(place)
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
    if place != folder:
        names = set_of(place.name, names)
    return folder / names[0] if names and are_one(names) else None


def holds_tokenizer(path: Path) -> bool:
    """Whether a GGUF file has a tokenizer, of whatever kind."""
    values = read_header(path).values
    return f"{KEY}tokens" in values or values.get(f"{KEY}model", _NONE[0]) not in _NONE


def is_of_merges(path: Path) -> bool:
    """Whether a GGUF file's tokenizer is of bytes' merges, as `accessory.text.gguf_merges` has it."""
    return read_header(path).values.get(f"{KEY}model") == gguf_merges.KIND


def said_within(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokens in the words of a tokenizer_config.json, where no sentencepiece model does.

    Raises:
        ValueError: as `gguf_merges.tokenizer_config`.
    """
    values = read_header(path).values
    return gguf_merges.tokenizer_config(values, path) if values.get(f"{KEY}model") == gguf_merges.KIND else {}


def sentencepiece_of(path: Path) -> bytes:
    """The sentencepiece model that a GGUF file's tokenizer is.

    Raises:
        ValueError: it is of another kind, or damaged; names the file.
    """
    values = read_header(path).values
    kind = values.get(f"{KEY}model")
    if kind != "llama":
        raise ValueError(
            f"{path} has the tokenizer {shown(kind)}, and of GGUF's only llama (sentencepiece) and gpt2 (bytes' "
            f"merges) are read: {gguf_merges.WAY_OUT}"
        )
    tokens = values.get(f"{KEY}tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    scores, types = numbers_of(values, "scores", count), types_of(values, count)
    if not isinstance(tokens, list) or not count or scores is None or types is None:
        raise ValueError(f"{path} has no tokens with a score and a type each: copy it again")
    defaults = {"unknown": 0, "bos": 1, "eos": 2, "padding": None}
    names = {role: token_of(values, path, role, count, default) for role, default in defaults.items()}
    # Rows that fill a vocabulary up are no tokens.
    while count and types[count - 1] == UNUSED and tokens[count - 1] == pad_name(count - 1):
        count -= 1
    types = types[:count].tolist()
    for role in ("bos", "eos"):
        if (own := names[role]) is not None and own < count:
            types[own] = CONTROL
    pieces = [
        _field(1, _field(1, _piece(token, kind).encode()) + _float(2, score) + _varint(3, kind))
        for token, score, kind in zip(tokens, scores.tolist(), types, strict=False)
    ]
    trainer = _varint(3, 2) + _varint(4, count) + _varint(35, int(BYTE in types))  # byte pairs
    for role, own_id, own_name in (("unknown", 40, 45), ("bos", 41, 46), ("eos", 42, 47), ("padding", 43, 48)):
        own = names[role]
        if own is not None:
            trainer += _varint(own_id, own) + _field(own_name, _piece(tokens[own], types[own]).encode())
        elif role != "unknown":
            trainer += _varint(own_id, (1 << 64) - 1)
    charsmap = values.get(f"{KEY}precompiled_charsmap")
    normalizer = _field(1, b"identity" if charsmap is None else b"user_defined")
    normalizer += b"" if charsmap is None else _field(2, np.asarray(charsmap).astype(np.uint8).tobytes())
    normalizer += _varint(3, int(values.get(f"{KEY}add_space_prefix", True) is not False))
    normalizer += _varint(4, int(values.get(f"{KEY}remove_extra_whitespaces", False) is True)) + _varint(5, 1)
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def content_of(path: Path) -> bytes:
    """All that a GGUF file's tokenizer is made of, whatever kind it is: equal for equal tokenizers."""
    values = read_header(path).values
    own = {key: value for key, value in values.items() if key.startswith(KEY)}
    return json.dumps(own, sort_keys=True, default=np.ndarray.tolist).encode()


def templates_in(path: Path) -> dict[str, str]:
    """The chat templates of a GGUF file by name; "default" is the one for chats."""
    values = read_header(path).values
    named = {
        key.removeprefix(f"{_TEMPLATE}."): value for key, value in values.items() if key.startswith(f"{_TEMPLATE}.")
    }
    found = {**named, "default": values.get(_TEMPLATE)}
    return {name: template for name, template in found.items() if isinstance(template, str) and template}


def text_metadata(tokenizer: Written | None, templates: Mapping[str, str], rows: int) -> dict[str, Any]:
    """A GGUF file's metadata about a tokenizer and chat templates.

    Args:
        tokenizer: one of which `unsaid` has nothing to say; None: the file is to have none.
        rows: of the vocabulary, one for each token or more.

    Raises:
        ValueError: they are fewer.
    """
    if tokenizer is not None and tokenizer.n_words > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.n_words} tokens, the model's vocab_size is only {rows}: they belong to "
            "different models"
        )
    found: dict[str, Any] = {f"{KEY}model": _NONE[0]}
    if tokenizer is not None:
        found = gguf_merges.metadata(tokenizer, rows) if tokenizer.is_json else _tokens(tokenizer, rows)
    for name, template in templates.items():
        found[_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}"] = template
    return found


def _tokens(tokenizer: Written, rows: int) -> dict[str, Any]:
    model = tokenizer.sentencepiece_model
    tokens, scores, types = [], [], []
    normalizer: dict[int, Any] = {}
    for number, value in _fields(model):
        if number == 1:
            piece = dict(_fields(value))
            kind = piece.get(3, NORMAL)
            tokens.append(_text(piece.get(1, b"").decode(), kind))
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            types.append(kind)
        elif number == 3:
            normalizer |= dict(_fields(value))
    gaps = frozenset(tokenizer.gaps)
    for token in range(rows):
        added = token < tokenizer.n_words and token not in gaps
        if token < len(tokens) and (not added or _text(tokenizer.name(token), types[token]) == tokens[token]):
            continue
        own = tokenizer.name(token) if added else pad_name(token)
        kind = UNUSED if not added else CONTROL if tokenizer.is_control(token) else USER_DEFINED
        place = slice(token, token + 1)  # an added token may stand in for one of the model's
        tokens[place], types[place], scores[place] = [own], [kind], [_ADDED_SCORE if added else _PAD_SCORE]
    ids = {"eos": tokenizer.eos_id} | ({} if tokenizer.bos_id is None else {"bos": tokenizer.bos_id})
    if UNKNOWN in types:
        ids["unknown"] = types.index(UNKNOWN)
    ids |= gguf_merges.more_ends_of(tokenizer)
    charsmap = normalizer.get(2, b"")
    return {
        f"{KEY}model": "llama",
        f"{KEY}pre": "default",
        f"{KEY}tokens": tokens,
        f"{KEY}scores": np.array(scores, np.float32),
        f"{KEY}token_type": np.array(types, np.int32),
        **{f"{KEY}{role}_token_id": token for role, token in ids.items()},
        f"{KEY}add_bos_token": tokenizer.bos_id is not None,
        f"{KEY}add_eos_token": False,
        f"{KEY}add_space_prefix": bool(normalizer.get(3, 1)),
        f"{KEY}remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        **({f"{KEY}precompiled_charsmap": np.frombuffer(charsmap, np.uint8)} if charsmap else {}),
    }


def unsaid(tokenizer: Written) -> str:
    """Why a GGUF file cannot hold a tokenizer; empty where it can."""
    if tokenizer.is_json:
        return gguf_merges.unsaid(tokenizer.json_content)
    trainers = (dict(_fields(value)) for number, value in _fields(tokenizer.sentencepiece_model) if number == 2)
    return "" if any(own.get(3, 1) == 2 for own in trainers) else "is a sentencepiece model of no byte pairs"


def unlike(tokenizer: Written) -> str:
    """What llama.cpp leaves out that a tokenizer does; empty where there is nothing."""
    if tokenizer.is_json:
        return gguf_merges.unlike(tokenizer.json_content)
    fields = _fields(tokenizer.sentencepiece_model)
    own = {number: dict(_fields(value)) for number, value in fields if number == 3}.get(3, {})
    return "changes texts before it reads them" if own.get(2, b"") or own.get(4, 1) else ""


def more_ends(path: Path) -> tuple[int, ...]:
    """The tokens that end an answer beside the tokenizer's own."""
    values = read_header(path).values
    found = (values.get(f"{KEY}{role}_token_id") for role in MORE_ENDS)
    return tuple(token for token in found if type(token) is int)


def is_pad(token: int, name: str) -> bool:
    """Whether a token is none, but a row that fills a vocabulary up."""
    return name == pad_name(token)


# A token that was given by its user stands in GGUF with plain spaces.
def _piece(token: str, kind: int) -> str:
    return token.replace(" ", "\u2581") if kind == USER_DEFINED else token


def _text(piece: str, kind: int) -> str:
    return piece.replace("\u2581", " ") if kind == USER_DEFINED else piece


def _number(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _float(field: int, value: float) -> bytes:
    return _number(field << 3 | 5) + struct.pack("<f", value)


def _field(field: int, data: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(data)) + data


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message that sentencepiece has read: numbers, and the bytes of the others."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value, at

    at = 0
    while at < len(data):
        tag, at = number(at)
        if tag & 7 == 0:
            value, at = number(at)
            yield tag >> 3, value
            continue
        size, at = {1: (8, at), 5: (4, at)}[tag & 7] if tag & 7 in (1, 5) else number(at)
        yield tag >> 3, data[at : at + size]
        at += size
