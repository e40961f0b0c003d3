"""What Hugging Face's files beside a tokenizer say: tokens added to it, which of them are special, which end a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.gguf_header import SUFFIX
from accessory.text.gguf import said_within

SENTENCEPIECE_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
GENERATION_NAME = "generation_config.json"
MODEL_NAME = "config.json"
SPECIAL_NAME = "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"
# What else of Hugging Face's folders says which tokens there are.
BESIDE_NAMES = (CONFIG_NAME, SPECIAL_NAME, ADDED_NAME, GENERATION_NAME)

# An added token of such a name is a control token, whether or not its file says so: no text has a use for it. Tags such
# as <think> and <tool_call> are of answers, and stay what their file says.
_MARK = re.compile(r"<\|.+\|>|<\uff5c.+\uff5c>|\[/?[A-Z][A-Z0-9_ ]*\]")
_MOST_ADDED = 1 << 16  # so far beyond a vocabulary may ids lie


@dataclass(frozen=True)
class AddedToken:
    """A token that a file adds to a vocabulary."""

    id: int
    name: str
    file: Path
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class TokenSettings:
    """What Hugging Face's files beside a tokenizer say of its tokens.

    `names` are those of "bos_token" and so on, `homes` the files that say them; `special` all that are called special;
    `prefixes` whether Hugging Face's tokenizer puts a space before a text behind a control token too; `ids` the
    tokens of "bos_token" and so on by the model's own config, where a tokenizer.json has no settings beside it;
    `begins` whether a text begins with a token, which some families have not; None: no file says it.
    """

    files: tuple[Path, ...]
    names: dict[str, str]
    homes: dict[str, Path]
    special: frozenset[str]
    added: tuple[AddedToken, ...]
    ends: tuple[int, ...]
    prefixes: bool
    ids: dict[str, int]
    begins: bool | None

    @classmethod
    def beside(cls, tokenizer: Path, folders: Sequence[Path]) -> TokenSettings:
        # A tokenizer.json may know more tokens than the sentencepiece model beside it.
        more = () if tokenizer.suffix == ".json" else (JSON_NAME,)
        files = (tokenizer.with_name(name) for name in (CONFIG_NAME, SPECIAL_NAME, *more, ADDED_NAME))
        read = {file: _read_json(file) for file in files if file.is_file()}
        lying = tuple(read)
        if tokenizer.suffix == SUFFIX:  # what lies beside it rules
            read[tokenizer] = said_within(tokenizer)
        added: dict[int, AddedToken] = {}
        names, homes, special = {}, {}, set()
        for file, content in reversed(read.items()):  # the first one rules
            for token, value in _tokens(file, content):
                if name := _name(value):
                    flags = value if isinstance(value, dict) else {}
                    is_special, lstrip, rstrip = (flags.get(flag) is True for flag in ("special", "lstrip", "rstrip"))
                    added[token] = AddedToken(token, name, file, lstrip, rstrip)
                    special |= {name} if is_special else set()
            for key, value in content.items() if file.name in (CONFIG_NAME, SPECIAL_NAME) or file == tokenizer else ():
                if key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list | dict):
                    special |= set(map(_name, value.values() if isinstance(value, dict) else value))
                elif key.endswith("_token") and (name := _name(value)):
                    names[key], homes[key] = name, file
        places = (folder / GENERATION_NAME for folder in (*reversed(folders), tokenizer.parent))
        generations = {file: _read_json(file).get("eos_token_id") for file in places if file.is_file()}
        generation = sorted(generations, key=lambda file: generations[file] is None)[:1]
        bare = tokenizer.suffix == ".json" and tokenizer.with_name(CONFIG_NAME) not in read
        models = (folder / MODEL_NAME for folder in (*reversed(folders), tokenizer.parent)) if bare else ()
        said = next((_read_json(file) for file in models if file.is_file()), {})
        ends = _numbers(generations[generation[0]] if generation else None) or _numbers(said.get("eos_token_id"))
        firsts = {"bos_token": _numbers(said.get("bos_token_id")), "eos_token": ends}
        begins = [own for content in read.values() if (own := content.get("add_bos_token")) is not None]
        return cls(
            files=(*lying, *generation),
            names=names,
            homes=homes,
            special=frozenset({*special, *names.values()}),
            added=tuple(added[token] for token in sorted(added)),
            prefixes=_prefixes(read.get(tokenizer.with_name(JSON_NAME), {})),
            ends=ends,
            ids={key: numbers[0] for key, numbers in firsts.items() if numbers} if bare else {},
            begins=begins[0] is not False if begins else None,
        )

    def controls(self, name: str) -> bool:
        """Whether an added token of that name is never read in a text."""
        return name in self.special or _MARK.fullmatch(name) is not None

    def check(self, size: int, *more: AddedToken) -> None:
        """Raise ValueError where a token is far from the `size` ids of the vocabulary that it is added to."""
        for token in (*self.added, *more):
            if not 0 <= token.id < size + _MOST_ADDED:
                raise ValueError(
                    f"{token.file}: correct the id of {token.name!r}, {token.id}: ids are 0 to {size + _MOST_ADDED - 1}"
                )


def _prefixes(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts its prefix before each piece of a text that control tokens part."""
    for place, nested in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        whole = content.get(place)
        parts = whole.get(nested, [whole]) if isinstance(whole, dict) else []
        for part in parts if isinstance(parts, list) else ():
            if not isinstance(part, dict) or part.get("add_prefix_space") is False:
                continue
            always = part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") == "always"
            if always or part.get("type") == "Prepend":
                return True
    return False


def _tokens(file: Path, content: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """What a file adds to a vocabulary: ids, and the tokens as it writes them."""
    if file.name == CONFIG_NAME and isinstance(decoder := content.get("added_tokens_decoder"), dict):
        for key, value in decoder.items():
            if re.fullmatch(r"-?[0-9]{1,20}", key) is None:
                raise ValueError(f"{file}: correct {key[:40]!r} in added_tokens_decoder, it is no token id")
            yield int(key), value
    elif file.name == JSON_NAME and isinstance(listed := content.get("added_tokens"), list):
        yield from ((one["id"], one) for one in listed if isinstance(one, dict) and type(one.get("id")) is int)
    elif file.name == ADDED_NAME:
        yield from ((token, name) for name, token in content.items() if type(token) is int)


def _numbers(value: Any) -> tuple[int, ...]:
    """The ids that a config says, one or several."""
    return tuple(number for number in (value if isinstance(value, list) else [value]) if type(number) is int)


def _name(value: Any) -> str:
    """A token's name as these files write it, with its flags or without; empty for what is none."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    """The object that a file of settings holds."""
    try:
        found = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        if path.read_bytes()[:1] in (b"", b"v"):
            raise
        raise ValueError(f"{path} is not valid JSON: copy or download it again ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object: copy or download it again")
    return found


def read_file(path: Path) -> bytes:
    """The bytes of a file that may be there in name only."""
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {path}: check the path")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: copy or download it again")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder")
    return data
