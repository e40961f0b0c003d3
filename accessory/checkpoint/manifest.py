"""What lies in a checkpoint folder, found from names alone: no weight is read here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accessory.config import ModelArgs, QuantArgs, part_of_config, read_json
from accessory.errors import CheckpointError
from accessory.text.form_files import META_NAME, MORE_TEMPLATES, TEXT_NAMES
from accessory.text.tokenizer import CONFIG_NAME, JSON_NAME, SENTENCEPIECE_NAME

_CONVERTED = re.compile(r"consolidated\.(\d+)-of-(\d+)\.model\.pth")
_RELEASED = re.compile(r"consolidated\.(\d+)\.pth")
_COMPANIONS = frozenset(
    {
        "config.json",
        META_NAME,
        "params.json",
        *TEXT_NAMES,
        MORE_TEMPLATES,
        "split.py",
        "README.md",
        "converted",
        "checklist.chk",
    }
)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a checkpoint folder.

    Attributes:
        folder: the folder.
        form: "converted" (accessory's consolidated.XX-of-NN.model.pth) or "consolidated" (consolidated.NN.pth).
        shards: the weight files in order.
        config: config.json or params.json, if there is one.
        llama_type: what meta.json says, if there is one.
        odd: names of entries that belong to no checkpoint.
    """

    folder: Path
    form: str
    shards: tuple[Path, ...]
    config: Path | None
    llama_type: str | None
    odd: tuple[str, ...]

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Recognise a folder.

        Raises:
            FileNotFoundError: no such folder.
            CheckpointError: no weights in it, or a set of shards with gaps or of several runs.
            ValueError: an unreadable meta.json.
        """
        folder = Path(folder)
        if not folder.exists():
            raise FileNotFoundError(f"checkpoint folder {folder} does not exist: check the path")
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; give the folder that holds the consolidated.* files")
        names = sorted(entry.name for entry in folder.iterdir())
        converted = [match for name in names if (match := _CONVERTED.fullmatch(name))]
        released = [match for name in names if (match := _RELEASED.fullmatch(name))]
        if not converted and not released:
            raise CheckpointError(_no_weights(folder, names))
        if converted and released:
            raise CheckpointError(
                f"{folder} holds both {converted[0].string} and {released[0].string}: "
                "keep one checkpoint in a folder, move the other away"
            )
        chosen = converted or released
        shards = _complete(folder, chosen, "converted" if converted else "consolidated")
        known = {match.string for match in chosen} | _COMPANIONS
        configs = [folder / name for name in ("config.json", "params.json") if name in names]
        return cls(
            folder=folder,
            form="converted" if converted else "consolidated",
            shards=shards,
            config=configs[0] if configs else None,
            llama_type=_llama_type(folder / META_NAME),
            odd=tuple(name for name in names if name not in known),
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer in one of its two forms."""
        pair = (self.folder / JSON_NAME, self.folder / CONFIG_NAME)
        return (self.folder / SENTENCEPIECE_NAME).exists() or all(file.exists() for file in pair)

    def load_args(
        self,
        llama_config: Sequence[str | Path] | None = None,
        llama_type: str | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> ModelArgs:
        """The model's sizes from the given config files, else from the folder's own.

        Args:
            llama_type: in place of what meta.json says; it decides whether there are adapters.
            adapters: keys about adapters, which rule over the files.

        Raises:
            CheckpointError: there is none.
            ValueError: it is unusable; names file and key.
        """
        if llama_config is None and self.config is None:
            raise CheckpointError(
                f"{self.folder} has neither config.json nor params.json: add it, or pass llama_config=PATH"
            )
        files = [self.config] if llama_config is None and self.config is not None else list(llama_config or ())
        return ModelArgs.load(files, llama_type or self.llama_type, adapters)

    def load_quant(self) -> QuantArgs | None:
        """How the folder's matrices are quantized, as its config says; None: they are not.

        A config that is no JSON says nothing: where it is needed `load_args` refuses it, and where another is given
        in its place it does not count.

        Raises:
            ValueError: what it says of quantization is unusable; names the file.
        """
        try:
            values = {} if self.config is None else read_json(self.config)
        except ValueError:
            return None
        try:
            return None if values.get("quant") is None else part_of_config("quant", QuantArgs, values["quant"])
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from None


def _complete(folder: Path, matches: list[re.Match[str]], form: str) -> tuple[Path, ...]:
    found = {int(match[1]): match.string for match in matches}
    count = max(found) + 1
    if form == "converted":
        counts = sorted({int(match[2]) for match in matches})
        if len(counts) > 1:
            raise CheckpointError(
                f"{folder} holds shards of several runs (of {' and of '.join(map(str, counts))} files): "
                f"{matches[0].string}, {matches[-1].string}; keep the files of one run"
            )
        count = counts[0]
    extra = [name for index, name in found.items() if index >= count]
    if extra:
        raise CheckpointError(f"{folder} holds {extra[0]}, which numbers beyond its own total of {count}: remove it")
    if len(found) < count:
        name = (
            "consolidated.{:02d}-of-" + f"{count:02d}.model.pth" if form == "converted" else "consolidated.{:02d}.pth"
        )
        first = [name.format(index) for index in islice((i for i in range(count) if i not in found), 3)]
        more = count - len(found) - len(first)
        raise CheckpointError(
            f"{folder} lacks {', '.join(first)}{f' and {more} more' if more else ''} "
            f"({len(found)} of {count} shards found): copy the rest"
        )
    twice = [match.string for match in matches if found[int(match[1])] != match.string]
    if twice:
        raise CheckpointError(
            f"{folder} holds two files with one shard number, {twice[0]} and another: remove one of them"
        )
    return tuple(folder / found[index] for index in range(count))


def _no_weights(folder: Path, names: list[str]) -> str:
    if not names:
        return f"checkpoint folder {folder} is empty: copy a checkpoint there, or check the path"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"{folder} holds no weights: expected consolidated.00-of-NN.model.pth and so on, or consolidated.00.pth; "
        f"found {shown}"
    )


def _llama_type(path: Path) -> str | None:
    if not path.exists():
        return None
    value = read_json(path).get("llama_type")
    if not isinstance(value, str):
        raise ValueError(f'{path} must say {{"llama_type": "mistral"}} or the like; llama_type is {value!r}')
    return value
