"""GGUF's tokenizer "gpt2", merges of a text's bytes, as Hugging Face's tokenizer.json and back.

How a text is parted before its pieces are merged a GGUF file says by a name alone (tokenizer.ggml.pre). Which pattern a
name stands for are facts of llama.cpp's src/llama-vocab.cpp and of the tokenizer.json that its converter was given;
those of other names would have to be guessed, so that they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from accessory.errors import shown
from accessory.text.gguf_tokens import (
    CONTROL,
    KEY,
    MORE_ENDS,
    NORMAL,
    ROLES,
    UNUSED,
    USER_DEFINED,
    pad_name,
    token_of,
    types_of,
)

KIND = "gpt2"
WAY_OUT = (
    "put the model's tokenizer.json and tokenizer_config.json, or its tokenizer.model, beside it, or name their place "
    "with --tokenizer_path"
)


@dataclass(frozen=True)
class Parting:
    """How llama.cpp reads a text by a name of tokenizer.ggml.pre.

    Attributes:
        pattern: of the pieces.
        whole: a piece that is a token is that, whatever the merges make of it.
        begins: whether bos_token begins a text where a file does not say it.
    """

    pattern: str
    whole: bool = False
    begins: bool = False


# The one that tokenizer.json's ByteLevel has of its own.
_OWN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    return rf"{_SHORT}|{_WORD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


_BY_CASE = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_SHORT}?|{_WORD}{_UPPER}+{_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
# Of those with one pattern the first is written.
PARTINGS: Mapping[str, Parting] = {
    "gpt-2": Parting(_OWN),
    "olmo": Parting(_OWN),
    "qwen2": Parting(_words(r"\p{N}")),
    "glm4": Parting(_words(r"\p{N}{1,3}")),
    "chatglm-bpe": Parting(_words(r"\p{N}{1,3}")),
    "llama-bpe": Parting(_words(r"\p{N}{1,3}"), whole=True, begins=True),
    "gpt-4o": Parting(_BY_CASE),
    "minimax-m2": Parting(_BY_CASE),
}


class Written(Protocol):
    """What is asked of a tokenizer that is written."""

    n_words: int
    gaps: tuple[int, ...]
    bos_id: int | None
    eos_id: int
    eos_ids: frozenset[int]
    names: Mapping[str, str]

    @property
    def json_content(self) -> dict[str, Any]: ...

    def name(self, token_id: int) -> str: ...

    def is_control(self, token_id: int) -> bool: ...


# -- read


def tokenizer_json(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The tokenizer.json that a file's metadata stands for.

    Raises:
        ValueError: it is damaged, or parts texts in a way that is not known here; names the file.
    """
    parting = _parting(values, path)
    tokens, merges = values.get(f"{KEY}tokens"), values.get(f"{KEY}merges")
    types = types_of(values, len(tokens)) if isinstance(tokens, list) else None
    if not isinstance(tokens, list) or not tokens or not isinstance(merges, list) or types is None:
        raise ValueError(f"{path} has no merges, or no tokens with a type each: copy it again")
    # Rows that fill a vocabulary up are no tokens.
    kinds = {
        token: kind
        for token, (name, kind) in enumerate(zip(tokens, types.tolist(), strict=True))
        if name and (kind != UNUSED or name != pad_name(token))
    }
    vocabulary = {tokens[token]: token for token in kinds}
    if len(vocabulary) < len(kinds):
        twice = next(tokens[token] for token in kinds if vocabulary[tokens[token]] != token)
        raise ValueError(f"{path} has the token {shown(twice)} twice: copy it again")
    pairs = [(merge, merge.find(" ", 1)) for merge in merges]
    if any(at < 0 for _, at in pairs):
        raise ValueError(f"{path} has merges that are of no two tokens: copy it again")
    config = tokenizer_config(values, path)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": parting.pattern}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": tokens[token], **flags, "special": kind == CONTROL}
            for token, kind in kinds.items()
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level if parting.pattern == _OWN else both,
        "post_processor": _begun_with(config["bos_token"], vocabulary) if config["add_bos_token"] else byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": parting.whole,
            "vocab": vocabulary,
            "merges": [[merge[:at], merge[at + 1 :]] for merge, at in pairs],
        },
    }


def tokenizer_config(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The tokenizer_config.json that a file's metadata stands for. Raises as `tokenizer_json`."""
    tokens = values.get(f"{KEY}tokens")
    tokens = tokens if isinstance(tokens, list) else []
    found = {role: token_of(values, path, role, len(tokens)) for role in ROLES}
    begins = values.get(f"{KEY}add_bos_token", _parting(values, path).begins) is True
    return {
        # Of transformers' the one that takes a tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{ROLES[role]: tokens[token] for role, token in found.items() if token is not None},
        "add_bos_token": begins and found["bos"] is not None,
    }


def _parting(values: Mapping[str, Any], path: Path) -> Parting:
    name = values.get(f"{KEY}pre")
    if not isinstance(name, str) or name not in PARTINGS:
        raise ValueError(
            f"{path} has {KEY}pre {shown(name)}, and how texts are parted is known here of {', '.join(PARTINGS)} "
            f"alone: {WAY_OUT}"
        )
    return PARTINGS[name]


def _begun_with(name: str, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    single, more = ({"Sequence": {"id": which, "type_id": number}} for number, which in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, single],
        "pair": [begin, single, more],
        "special_tokens": {name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]}},
    }


# -- written


def metadata(tokenizer: Written, rows: int) -> dict[str, Any]:
    """A GGUF file's metadata of a tokenizer of which `unsaid` says nothing, for a vocabulary of so many rows."""
    content, gaps = tokenizer.json_content, frozenset(tokenizer.gaps)
    added = {own["id"] for own in content["added_tokens"]}
    tokens, types = [], []
    for token in range(rows):
        is_none = token >= tokenizer.n_words or token in gaps
        tokens.append(pad_name(token) if is_none else tokenizer.name(token))
        of_added = CONTROL if not is_none and tokenizer.is_control(token) else USER_DEFINED
        types.append(UNUSED if is_none else of_added if token in added else NORMAL)
    numbers = {name: token for token, name in enumerate(tokens)}
    # Settings may name tokens that there are none of, such as a padding's.
    ids = {role: numbers[own] for role, name in ROLES.items() if (own := tokenizer.names.get(name)) in numbers}
    ids |= {"eos": tokenizer.eos_id, **more_ends_of(tokenizer)}
    return {
        f"{KEY}model": KIND,
        f"{KEY}pre": _name_of(content),
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": np.array(types, np.int32),
        f"{KEY}merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]],
        **{f"{KEY}{role}_token_id": token for role, token in ids.items()},
        f"{KEY}add_bos_token": tokenizer.bos_id is not None,
        f"{KEY}add_eos_token": False,
        f"{KEY}add_space_prefix": False,
    }


def more_ends_of(tokenizer: Written) -> dict[str, int]:
    """The tokens that end an answer beside the tokenizer's own, by role, as far as there are roles."""
    return dict(zip(MORE_ENDS, sorted(tokenizer.eos_ids - {tokenizer.eos_id}), strict=False))


def unsaid(content: Mapping[str, Any]) -> str:
    """Why a GGUF file cannot hold the tokenizer of a tokenizer.json; empty where it can."""
    model = content["model"]
    odd = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model.get("type") != "BPE" or any(model.get(name) for name in odd):
        return "is no tokenizer of bytes' merges"
    return "" if _name_of(content) is not None else f"parts texts in a way that no {KEY}pre is known for"


def unlike(content: Mapping[str, Any]) -> str:
    """What llama.cpp leaves out that a tokenizer.json does; empty where there is nothing."""
    stripping = [own["content"] for own in content["added_tokens"] if own["lstrip"] or own["rstrip"]]
    parts = ["changes texts before it reads them"] if content.get("normalizer") else []
    parts += [f"takes white space around {stripping[0]!r}"] if stripping else []
    return " and ".join(parts)


def _name_of(content: Mapping[str, Any]) -> str | None:
    """By which name llama.cpp parts texts as a tokenizer.json does."""
    pattern, model = _pattern_of(content.get("pre_tokenizer") or {}), content["model"]
    names = [name for name, own in PARTINGS.items() if own.pattern == pattern]
    alike = [name for name in names if PARTINGS[name].whole == bool(model.get("ignore_merges"))]
    if alike or not names:
        return alike[0] if alike else None
    return names[0] if _merges_reach_all(content) else None


def _pattern_of(whole: Mapping[str, Any]) -> str | None:
    *before, last = whole["pretokenizers"] if whole.get("type") == "Sequence" else [whole]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        return None if before else _OWN
    if len(before) != 1 or before[0].get("type") != "Split":
        return None
    (split,) = before
    # Two ways to say it: what the pattern meets is a piece by itself, or what it does not meet goes.
    ways = (("Isolated", False), ("Removed", True))
    return split["pattern"].get("Regex") if (split["behavior"], split["invert"]) in ways else None


def _merges_reach_all(content: Mapping[str, Any]) -> bool:
    """Whether no token is read but by its merges, so that it is the same whether pieces are taken whole."""
    own, added = content["model"], {one["content"] for one in content["added_tokens"]}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in own["merges"])
    model = tokenizers.models.BPE(own["vocab"], [(first, second) for first, second in pairs])
    return all(len(model.tokenize(token)) == 1 for token in own["vocab"] if token not in added)
