"""Text to token ids and back, with the tokenizer that lies beside a checkpoint.

A checkpoint carries either a sentencepiece model (`tokenizer.model`) or Hugging Face's `tokenizer.json`, as a rule with
`tokenizer_config.json`; a GGUF file has one within it. One class, `Tokenizer`, hides which: nothing else in the
library asks.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from accessory.gguf_header import SUFFIX, folder_of, read_header
from accessory.text import gguf_merges
from accessory.text.added_tokens import BESIDE_NAMES as BESIDE_NAMES
from accessory.text.added_tokens import (
    CONFIG_NAME,
    JSON_NAME,
    MODEL_NAME,
    SENTENCEPIECE_NAME,
    AddedToken,
    TokenSettings,
    read_file,
)
from accessory.text.gguf import find_gguf, holds_tokenizer, is_of_merges, is_pad, more_ends, sentencepiece_of

_SPACES = re.compile(r"\s*")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Appended to a sentencepiece model: its normalizer (field 3) gets add_dummy_prefix (field 3) false, as protobuf merges
# a message that is given twice.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """The tokenizer of a checkpoint.

    `path` is a sentencepiece model under any name, a `tokenizer.json`, a GGUF file, or a folder that holds one of these
    (in this order they win). What begins and ends a text stands in the `tokenizer_config.json` beside a
    `tokenizer.json`; without one in its post-processor, or in the model's generation_config.json or config.json.
    `beside` are the folders of its model: the last one whose generation_config.json says what ends a text rules over
    the tokenizer's own.

    Attributes: `path`, the file that was read; `files`, all that were; `n_words`, the number of token ids, 0 to
    n_words - 1; `gaps`, those of them that are no token; `bos_id` and `eos_id`, the ids that begin (None:
    nothing does, where the settings' add_bos_token is false) and end a sequence;
    `eos_ids`, all that end one, those of generation_config.json among them; `controls`, the control tokens by name;
    `names`, what the settings call "bos_token", "eos_token" and so on.

    Raises FileNotFoundError where a file is absent and ValueError where one cannot be read; both name it.
    """

    def __init__(self, path: str | Path, beside: Sequence[str | Path] = ()) -> None:
        given = Path(path)
        found = self.find(given) if given.is_dir() else given
        if found is None:
            raise FileNotFoundError(f"{given} holds neither {SENTENCEPIECE_NAME} nor {JSON_NAME}: copy it there")
        self.path: Path = found
        self._beside = tuple(folder_of(Path(place)).absolute() for place in beside)
        settings = TokenSettings.beside(found, self._beside)
        is_json = found.suffix == ".json" or (found.suffix == SUFFIX and is_of_merges(found))
        self._backend: _SentencePiece | _Json = (_Json if is_json else _SentencePiece)(found, settings)
        self.files: tuple[Path, ...] = (found, *settings.files)
        self.n_words: int = self._backend.n_words
        self.bos_id: int | None = self._backend.bos_id
        self.eos_id: int = self._backend.eos_id
        self.gaps: tuple[int, ...] = self._backend.gaps
        known = sorted(set(range(self.n_words)).difference(self.gaps))
        ends = settings.ends or (more_ends(found) if found.suffix == SUFFIX else ())
        self.eos_ids = frozenset({self.eos_id, *set(known).intersection(ends)})
        self.controls: Mapping[str, int] = {self.name(token): token for token in known if self.is_control(token)}
        begin = {} if self.bos_id is None else {"bos_token": self.name(self.bos_id)}
        self.names: Mapping[str, str] = {**begin, "eos_token": self.name(self.eos_id), **settings.names}

    @staticmethod
    def find(place: str | Path) -> Path | None:
        """The tokenizer file of a folder: `tokenizer.model` before `tokenizer.json` before a GGUF file, or None.

        Of a GGUF file what lies beside it, in the same order, and then itself.
        """
        for name in (SENTENCEPIECE_NAME, JSON_NAME):
            if (candidate := folder_of(Path(place)) / name).is_file():
                return candidate
        gguf = find_gguf(Path(place))
        return gguf if gguf is not None and holds_tokenizer(gguf) else None

    @property
    def is_json(self) -> bool:
        """Whether it is Hugging Face's form."""
        return isinstance(self._backend, _Json)

    @property
    def json_content(self) -> dict[str, Any]:
        """A tokenizer.json with all tokens that files add to what was read; none of a sentencepiece model."""
        assert isinstance(self._backend, _Json)
        return self._backend.content

    @property
    def sentencepiece_model(self) -> bytes:
        """The sentencepiece model, as it was read; none of Hugging Face's form."""
        assert isinstance(self._backend, _SentencePiece)
        return self._backend.model

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `text`, with the begin and end tokens where `bos` and `eos` ask for them.

        The text is taken literally: a "<s>" in it is three characters, never the control token. Raises
        TypeError for what is not a string, ValueError for a string that has no UTF-8 form.
        """
        _check_text(text)
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        return begin + self._backend.encode(text) + [self.eos_id] * bool(eos)

    def cont(self, text: str) -> list[int]:
        """The ids of a text that continues another: without the prefix that a text's begin gets. Raises as `encode`."""
        _check_text(text)
        return self._backend.cont(text)

    def after_control(self, text: str) -> list[int]:
        """The ids of a text behind a control token, as Hugging Face's one pass over both has them; as `encode`."""
        _check_text(text)
        return self._backend.after_control(text)

    def split_controls(self, text: str) -> list[tuple[str, int | None]]:
        """`text` in pieces, each with its id where it is the name of a control token."""
        pieces: list[tuple[str, int | None]] = []
        at = 0
        for match in self._control_pattern.finditer(text):
            left, right = self._backend.stripping.get(match[0], (False, False))  # some take the white space around them
            begin, end = match.span()
            begin = at + len(text[at:begin].rstrip()) if left else begin
            end = _SPACES.match(text, end).end() if right else end  # type: ignore[union-attr]
            pieces += [(text[at:begin], None), (text[begin:end], self.controls[match[0]])]
            at = end
        return [piece for piece in (*pieces, (text[at:], None)) if piece[0]]

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        # Of two that begin at one place the longer one counts.
        return re.compile("|".join(map(re.escape, sorted(self.controls, key=len, reverse=True))) or "(?!)")

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids that `encode` gives without begin and end, and the characters that each stands for.

        A span is begin and end in `text`, the end excluded; empty for a prefix that the text lacks. The bytes
        of a character share it, or all but the last are empty at its begin. Raises as `encode` does.
        """
        _check_text(text)
        return self._backend.encode_with_spans(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Control tokens and gaps vanish, bytes that form no character become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._backend.decode([self._checked(token_id) for token_id in ids])

    def is_control(self, token_id: int) -> bool:
        """Whether the token has no text: begin, end and the like, and gaps. ValueError outside the vocabulary."""
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
        if not 0 <= number < self.n_words:
            raise ValueError(f"token id {number} is outside 0 to {self.n_words - 1}, those of {self.path}")
        return number

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path, tuple[Path, ...]]]:
        return Tokenizer, (self.path.absolute(), self._beside)  # `tokenizers` does not pickle encode_special_tokens

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, n_words={self.n_words})"


class _SentencePiece:
    """A sentencepiece model, with the tokens that Hugging Face's files add to it."""

    def __init__(self, path: Path, settings: TokenSettings) -> None:
        self.model = data = sentencepiece_of(path) if path.suffix == SUFFIX else read_file(path)
        advice = f"{path} is not a whole sentencepiece model: copy or download it again"
        # The format ends without a mark: a file cut off between two pieces still parses, as a smaller
        # vocabulary with default settings. The settings, fields 2 and 3, come after the pieces, field 1.
        if not {1, 2, 3} <= set(_top_level_fields(data)):
            raise ValueError(advice)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._continuing = sentencepiece.SentencePieceProcessor(model_proto=data + _NO_DUMMY_PREFIX)
        except Exception as error:  # its type differs between versions of the library
            raise ValueError(f"{advice} ({error})") from error
        size = int(self._processor.vocab_size())
        settings.check(size)
        self._added = {
            added.id: added
            for added in settings.added
            if added.id >= size or self._processor.id_to_piece(added.id) != added.name
        }
        self._control = {token for token in range(size) if self._processor.is_control(token)}
        self._control |= {token.id for token in self._added.values() if settings.controls(token.name)}
        self.n_words = max([size - 1, *self._added]) + 1
        self.gaps = tuple(token for token in range(size, self.n_words) if token not in self._added)
        ids = {token.name: token.id for token in self._added.values()}
        own = {"bos_token": int(self._processor.bos_id()), "eos_token": int(self._processor.eos_id())}
        for key, name in settings.names.items():
            if key in own:
                own[key] = ids.get(name, int(self._processor.piece_to_id(name)))  # that of <unk> for what is none
                if self.name(own[key]) != name:
                    raise ValueError(f"{settings.homes[key]}: correct {key}, {name!r} is no token of {path.name}")
        bos_id, self.eos_id = own.values()
        if bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path} has no begin or no end token: train it with bos_id and eos_id set")
        self.bos_id = None if settings.begins is False else bos_id
        self._control |= {bos_id, self.eos_id}
        self._read = {name: token for name, token in ids.items() if token not in self._control}
        names = sorted(self._read, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.stripping = {token.name: (token.lstrip, token.rstrip) for token in self._added.values()}
        self._anchor = self._processor.encode("a")
        self._prefixes = settings.prefixes
        if path.suffix == SUFFIX:  # which has no ids without a token
            fillers = (token for token in range(size) if is_pad(token, self._processor.id_to_piece(token)))
            self.gaps = (*self.gaps, *(token for token in fillers if self._processor.is_unused(token)))
        self._added |= {gap: AddedToken(gap, _unused(gap), path) for gap in self.gaps}
        self._control |= set(self.gaps)

    def encode(self, text: str) -> list[int]:
        return self.encode_with_spans(text)[0] if self._read else list(self._processor.encode(text))

    def cont(self, text: str) -> list[int]:
        return self._spans(text, self._continuing)[0] if self._read else list(self._continuing.encode(text))

    def after_control(self, text: str) -> list[int]:
        return self.encode(text) if self._prefixes else self.cont(text)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self._spans(text, self._processor)

    def _spans(self, text: str, first: Any) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0

        def take(end: int) -> None:
            found = (self._continuing if at else first).encode(text[at:end], return_type="offset_mapping")
            ids.extend(found["ids"])
            spans.extend((at + begin, at + end) for begin, end in found["offsets"])

        for match in self._pattern.finditer(text):
            take(match.start())
            ids.append(self._read[match[0]])
            spans.append(match.span())
            at = match.end()
        take(len(text))
        return ids, spans

    def decode(self, ids: list[int]) -> str:
        if not self._added:
            return str(self._processor.decode(ids)) if ids else ""
        text = ""
        run: list[int] = []
        for token in (*ids, None):
            if token is not None and token not in self._added:
                run.append(token)
                continue
            # Only a text's first word loses its space, so a later run is read behind another word.
            before = self._anchor if text else []
            text += str(self._processor.decode([*before, *run]))[len(self._processor.decode(before)) if before else 0 :]
            run = []
            if token is not None and token not in self._control:
                text += self._added[token].name
        return text

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control

    def name(self, token_id: int) -> str:
        added = self._added.get(token_id)
        return str(self._processor.id_to_piece(token_id)) if added is None else added.name

    def joins_next(self, token_id: int) -> bool:
        return False


class _Json:
    """A `tokenizer.json`, whose begin and end tokens `tokenizer_config.json` names, if there is one."""

    def __init__(self, path: Path, settings: TokenSettings) -> None:
        self._advice = f"{path} is not a tokenizer that the tokenizers library reads: copy or download it again"
        self._settings = settings
        if path.suffix == SUFFIX:
            self._content = gguf_merges.tokenizer_json(read_header(path).values, path)
        else:
            data = read_file(path)
            try:
                self._content = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self._advice} ({error})") from error
        self._tokenizer = self._made(self._content)
        self._names = {token_id: name for name, token_id in self._tokenizer.get_vocab().items()}
        if not self._names:
            raise ValueError(self._advice)
        last = max(self._names)
        settings.check(len(self._names), AddedToken(last, self._names[last], path))
        for token in settings.added:
            if self._names.get(token.id) != token.name:
                raise ValueError(f"{path} has no {token.name!r} under the id {token.id} that {token.file.name} says")
        self.n_words = last + 1
        self.gaps = tuple(token for token in range(self.n_words) if token not in self._names)
        self.bos_id = self._id_of("bos_token", path) if self._begins(path) else None
        self.eos_id = self._id_of("eos_token", path)
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {i for i, token in added.items() if token.special} | {self.eos_id}
        self._control |= set() if self.bos_id is None else {self.bos_id}
        self.stripping = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        self._names |= {gap: _unused(gap) for gap in self.gaps}
        self._control |= set(self.gaps)

    @property
    def content(self) -> dict[str, Any]:
        added = [
            {
                "id": token,
                "content": own.content,
                **{name: getattr(own, name) for name in ("single_word", "lstrip", "rstrip", "normalized")},
                "special": token in self._control,
            }
            for token, own in sorted(self._tokenizer.get_added_tokens_decoder().items())
        ]
        return {**self._content, "added_tokens": added}

    def _begins(self, path: Path) -> bool:
        """Whether a token begins a text: as the settings say; without a word of theirs, of bytes, as the file does.

        transformers' tokenizers of bytes put a token there only where their post-processor does.
        """
        whole = self._content.get("pre_tokenizer") or {}
        of_bytes = any(part.get("type") == "ByteLevel" for part in whole.get("pretokenizers", [whole]))
        if self._settings.begins is not None:
            return self._settings.begins
        return not of_bytes or not path.with_name(CONFIG_NAME).is_file() or "bos_token" in _around(self._content)

    def _made(self, content: Any) -> Any:
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{self._advice} ({error})") from error
        known = made.get_vocab()
        for token in self._settings.added:  # in order of their ids, as the library counts on
            if token.name not in known:
                flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": False}
                made.add_tokens([tokenizers.AddedToken(token.name, **flags)])
        for added in made.get_added_tokens_decoder().values():
            if not added.special and self._settings.controls(added.content):
                added.special = True
                made.add_special_tokens([added])
        # A file may have been saved with the limits of the run that made it, and its post-processor often
        # adds the begin token itself (it would stand there twice) or takes white space out of the spans.
        made.no_truncation()
        made.no_padding()
        made.post_processor = None
        made.encode_special_tokens = True  # "<s>" in a text is text
        return made

    def _id_of(self, key: str, path: Path) -> int:
        """The token of a role: as the settings name it; without any, as the file or the model's config says."""
        config = path.with_name(CONFIG_NAME)
        bare = not config.is_file()
        name, home = self._settings.names.get(key), self._settings.homes.get(key, config)
        if name is None and bare:
            name, home = _around(self._content).get(key), path
        if name is None and bare and (number := self._settings.ids.get(key)) is not None:
            if number not in self._names:
                raise ValueError(f"{path} has no token {number}, which the model's config names as {key}: correct it")
            return number
        if name is None and bare:
            raise FileNotFoundError(
                f"{path} does not say its {key}, and neither does a {MODEL_NAME}: add {config.name}, which names it"
            )
        if name is None:
            raise ValueError(f"{config} names no {key}: add one of the tokens of {JSON_NAME} there")
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise ValueError(f"{home}: correct {key}, {name!r} is no token of the {JSON_NAME} beside it")
        return int(token_id)

    @cached_property
    def _continuing(self) -> Any:
        return self._without_prefix(lambda part: True)

    @cached_property
    def _after_control(self) -> Any:
        return self._without_prefix(lambda part: part.get("prepend_scheme") == "first")

    def _without_prefix(self, chosen: Callable[[Mapping[str, Any]], bool]) -> Any:
        """The tokenizer whose chosen parts put nothing before a text; itself where none did."""
        content = deepcopy(self._content)
        for place, nested in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
            whole: dict[str, Any] = content.get(place) or {}
            for part in whole[nested] if whole.get("type") == "Sequence" else [whole]:
                if not chosen(part):
                    continue
                if part.get("type") == "Prepend":
                    part.update(prepend="")
                elif part.get("type") == "Metaspace":
                    part.update(prepend_scheme="never", add_prefix_space=False)
                elif part.get("type") == "ByteLevel":
                    part.update(add_prefix_space=False)
        return self._tokenizer if content == self._content else self._made(content)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def cont(self, text: str) -> list[int]:
        return list(self._continuing.encode(text, add_special_tokens=False).ids)

    def after_control(self, text: str) -> list[int]:
        return list(self._after_control.encode(text, add_special_tokens=False).ids)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: list[int]) -> str:
        visible = [token_id for token_id in ids if token_id not in self._control]
        return str(self._tokenizer.decode(visible, skip_special_tokens=False))

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control

    def name(self, token_id: int) -> str:
        return self._names[token_id]

    def joins_next(self, token_id: int) -> bool:
        # Control tokens are left out before the bytes are joined, so they do not part a run.
        return token_id in self._control or _BYTE_TOKEN.fullmatch(self._names[token_id]) is not None


def _around(content: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a tokenizer.json's post-processor puts before and behind a text, where it is one each."""
    whole: dict[str, Any] = content.get("post_processor") or {}
    for part in whole.get("processors", [whole]):
        if part.get("type") == "TemplateProcessing":
            names = [piece.get("SpecialToken", {}).get("id") for piece in part["single"]]
            at = names.index(None)  # of the text
            sides = {"bos_token": names[:at], "eos_token": names[at + 1 :]}
            return {key: side[0] for key, side in sides.items() if len(side) == 1}
    return {}


def _unused(gap: int) -> str:
    return f"<unused {gap}>"


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"encode takes a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = f"{text[error.start]!r} at character {error.start}"
        origin = "it comes from bytes that are no UTF-8, so decode or save them as what they are"
        raise ValueError(f"the text holds a lone surrogate, {at}: {origin}") from error


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
