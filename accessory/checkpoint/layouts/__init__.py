"""Layouts: the forms in which checkpoints lie, one file for each family of them, and what recognises them."""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accessory.config import ModelArgs, read_json, with_adapters
from accessory.errors import CheckpointError, unknown
from accessory.gguf_header import SUFFIX, Header, read_header
from accessory.model.LLM import family_of

from .accessory import BASE, META, MISTRAL, SPARSE, find_own, find_release, own_key
from .gguf import GGUF, find_gguf
from .gguf import sizes as sizes_of_gguf
from .hf import HF, INDEX_NAMES, find_hf, in_their_words, is_hf, unknown_keys
from .hf import sizes as sizes_of_hf
from .layout import Found, Layout
from .peft import PEFT, find_peft
from .rows import Parts, Source, parts_of

__all__ = [
    "BASE",
    "GGUF",
    "HF",
    "INDEX_NAMES",
    "META",
    "MISTRAL",
    "PEFT",
    "SPARSE",
    "WRITTEN",
    "Found",
    "Layout",
    "Parts",
    "Source",
    "choose_weights",
    "find_weights",
    "load_args",
    "own_key",
    "parts_of",
    "written_layout",
]

logger = logging.getLogger(__name__)

_STATE, _STATES = "state.json", re.compile(r"step-\d{8}")
_EXPORTED = re.compile(r"epoch\d+(-iter\d+)?")  # by a training run

# What can be written as a whole model, by the name that --to gives it.
WRITTEN: dict[str, Layout] = {layout.name: layout for layout in (BASE, SPARSE, MISTRAL, HF, GGUF)}
# In the order in which they rule where a folder holds several.
_FINDERS = (find_peft, find_hf, find_own, find_release, find_gguf)


def find_weights(folder: Path, names: Sequence[str]) -> list[Found]:
    """The weight files in a folder, by forms.

    Raises:
        CheckpointError: a set of shards with gaps or of several runs.
    """
    return [found for finder in _FINDERS if (found := finder(folder, names)) is not None]


def choose_weights(folder: Path, names: Sequence[str], *, called: str | None = None) -> Found:
    """The weight files that are read of all that are in a folder.

    Args:
        called: the folder, as messages name it.

    Raises:
        CheckpointError: there are none, or several forms of which none rules; as `find_weights`.
    """
    called = called or str(folder)
    try:
        found = find_weights(folder, names)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), called)) from None
    if not found:
        raise CheckpointError(_no_weights(called, names))
    first, *others = found
    if others and not first.rules:
        raise CheckpointError(
            f"{called} holds both {first.files[0][0]} and {others[0].files[0][0]}: "
            "keep one checkpoint in a folder, move the other away"
        )
    if others:
        named = (called, first.files[0][0], others[0].files[0][0])
        logger.warning("%s holds both %s and %s: the first is read", *named)
    if first.unusable is not None:
        raise CheckpointError(first.unusable.replace(str(folder), called))
    return first


def _no_weights(folder: str, names: Sequence[str]) -> str:
    if not names:
        return f"checkpoint folder {folder} is empty: copy a checkpoint there, or check the path"
    if any(name == _STATE or _STATES.fullmatch(name) for name in names):
        return f"{folder} holds training states, for --resume: give a model of the run, an epoch's folder"
    models = [name for name in names if _EXPORTED.fullmatch(name)]
    if models:
        newest = max(models, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        return f"{folder} is the folder of a run: give one of the models in it, such as {folder}/{newest}"
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"{folder} holds no weights: expected consolidated.00-of-NN.model.pth and so on, consolidated.00.pth, or "
        f"Hugging Face's model.safetensors or model-00001-of-NNNNN.safetensors and so on, or GGUF; found {listed}"
    )


def written_layout(name: str, args: ModelArgs, among: Sequence[str] | None = None) -> Layout:
    """The layout of that name, for a model of these sizes.

    Args:
        among: names from which the caller can choose; None: all.

    Raises:
        ValueError: none that can be written has it, or its config has no words for what the model computes.
    """
    if name not in WRITTEN:
        raise ValueError(unknown("to", name, WRITTEN))
    layout = WRITTEN[name]
    if unsaid := layout.unsaid(args):
        able = [other for other in among or WRITTEN if not WRITTEN[other].unsaid(args)]
        raise ValueError(f"{name} cannot say {unsaid}: take one of {', '.join(able)}")
    return layout


def load_args(
    paths: Sequence[str | Path],
    llama_type: str | None = None,
    adapters: Mapping[str, Any] | None = None,
    *,
    beside: Mapping[str, Any] | None = None,
) -> ModelArgs:
    """Read config files, ours, params.json, Hugging Face's or GGUF's; where several set a key, the last rules.

    Args:
        llama_type: what `ModelArgs.for_type` is to make of them; None: they stand for themselves.
        adapters: keys about adapters, which rule over all files.
        beside: settings that rule over the files.

    Raises:
        FileNotFoundError: a file that is absent.
        ValueError: not JSON, or contents that `ModelArgs.from_dict` refuses; names the file. Of a GGUF file it is a
            CheckpointError.
    """
    merged: dict[str, Any] = {}
    contents = [read_header(Path(path)) if Path(path).suffix == SUFFIX else read_json(path) for path in paths]
    try:
        for path, own in zip(paths, contents, strict=True):
            if isinstance(own, Header):
                merged.update(sizes_of_gguf(own))
            elif is_hf(own):
                merged.update(sizes_of_hf(own))
                _say_unknown(str(path), tuple(unknown_keys(own)))
            else:
                merged.update(own)
        merged.update(beside or {})
        args = ModelArgs.from_dict(merged)
        family_of(args.family, "family")
        if not adapters:
            return args if llama_type is None else args.for_type(llama_type)
    except ValueError as error:
        of_weights = any(isinstance(own, Header) for own in contents)
        kind = CheckpointError if of_weights else ValueError
        theirs = [own for own in contents if not isinstance(own, Header) and is_hf(own)]
        hint = in_their_words(theirs[-1], str(error)) if theirs else ""
        raise kind(f"{', '.join(map(str, paths))}: {error}{hint}") from None
    args = ModelArgs.from_dict(with_adapters(merged, adapters))  # what is wrong with them now is no file's
    return args if llama_type is None else args.for_type(llama_type)


@functools.cache
def _say_unknown(path: str, keys: tuple[str, ...]) -> None:
    """Say once in a process which keys of a config nobody here knows."""
    if keys:
        logger.warning("%s: passed over, as transformers does: %s", path, ", ".join(keys))
