"""The data yaml: which files a finetuning learns from, and how their records are read.

META:
  - path: ../data/alpaca.json    # or a folder that datasets saved; from the working folder, else from accessory/
    type: text                   # the only one: there is no image encoder here
    ratio: 0.5                   # the share of its usable records, drawn by seed; all of them by default
    preprocess: alpaca           # or single_turn_llava: a dialogue's first question and answer become an Alpaca record
    prompt_type: alpaca          # of Alpaca records, one of PROMPT_NAMES; other records ask in forms of their own

What form a record has is told by its fields (records.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from accessory.data.readers import check_data_file
from accessory.errors import shown, unknown
from accessory.text.instruction import PROMPT_NAMES

PREPROCESSORS = ("alpaca", "single_turn_llava")
_KEYS = ("path", "type", "ratio", "preprocess", "prompt_type")
_PACKAGE = Path(__file__).resolve().parents[1]
# In bytes; a thousand entries take a tenth of it. A data file in the yaml's place takes 3 s to parse for each MB.
_LARGEST = 1 << 20
_RECORDS = (".jsonl", ".csv", ".parquet")  # a .json file may be a yaml: JSON is a part of YAML
_NO_YAML = "{config} {why} and is no data yaml: list it in one, as in `META: [{{path: {config}}}]`, and give that"


@dataclass(frozen=True)
class Source:
    """Data: `ratio` (0 to 1) is the share of the usable records; the other two concern Alpaca records."""

    path: Path
    ratio: float = 1.0
    preprocess: str = "alpaca"
    prompt_type: str = "alpaca"


def read_data_config(path: str | Path) -> list[Source]:
    """The sources that the yaml at `path` lists, in order; each file was looked at, none was read.

    Raises FileNotFoundError where the yaml or a file is absent, ValueError where the yaml or an entry of it is
    wrong and for a file that cannot be read; the message names the yaml and the entry, or the file.
    """
    config = Path(path)
    entries = _entries(config)
    return [_source(entry, f"{config}: entry {number} of META", config) for number, entry in enumerate(entries, 1)]


def _entries(config: Path) -> list[Any]:
    if not config.is_file():
        raise FileNotFoundError(f"no data yaml {config}: check the path")
    if config.suffix in _RECORDS:
        raise ValueError(_NO_YAML.format(config=config, why="holds records"))
    if (size := config.stat().st_size) > _LARGEST:
        raise ValueError(_NO_YAML.format(config=config, why=f"has {size:,} bytes"))
    text = config.read_bytes()
    try:
        content = yaml.load(text, _Loader)
    # The last three are PyYAML's for a value that its tag, or the look of a date, promises and that is none.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{config} is not valid YAML: {_fault(error, text)}") from error
    if isinstance(content, list) and config.suffix == ".json":
        raise ValueError(_NO_YAML.format(config=config, why="holds records"))
    if not isinstance(content, dict) or "META" not in content:
        raise ValueError(f"{config} has no META: list the data files under it, as in `META: [{{path: data.json}}]`")
    for key in content:
        if key != "META":
            raise ValueError(f"{config}: {unknown('key', key, ('META',))}")
    if not isinstance(content["META"], list) or not content["META"]:
        raise ValueError(f"META of {config} is {shown(content['META'])}: give a list of entries with a path")
    return content["META"]


def _fault(error: Exception, text: bytes) -> str:
    """Why a yaml is wrong, and where: with the line, which is what its writer will look for."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        # PyYAML has a name of its own for what it was given as bytes.
        return " ".join(str(error).split()).replace(' in "<byte string>", ', " at ")
    why = ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
    lines = text.decode("utf-8-sig", errors="replace").split("\n")
    line = lines[mark.line].strip() if mark.line < len(lines) else ""
    return f"{why} at line {mark.line + 1}, column {mark.column + 1}" + (f": {shown(line, most=100)}" if line else "")


class _Loader(yaml.SafeLoader):
    """Plain YAML in which no key stands twice: of two files that share one entry the first would not be trained on."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _source(entry: Any, where: str, config: Path) -> Source:
    """The source of one entry; the oldest form of these files has a list [path, type] in its place."""
    if isinstance(entry, list) and len(entry) == 2:
        entry = {"path": entry[0], "type": entry[1]}
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {shown(entry)}: give a mapping with the keys {', '.join(_KEYS)}")
    for key in entry:
        if key not in _KEYS:
            raise ValueError(f"{where}: {unknown('key', key, _KEYS)}")
    # An absent value is the default, so `preprocess:` with nothing after it is as good as no line.
    given = {key: value for key, value in entry.items() if value is not None}
    if not isinstance(given.get("path"), str) or not given["path"]:
        raise ValueError(f"{where} has no path: name its data file")
    if given.get("type", "text") != "text":
        raise ValueError(f"{where} has type {given['type']!r}: only 'text' can be trained on, images are not supported")
    ratio = given.get("ratio", 1.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"{where} has ratio {ratio!r}: give a share over 0 and up to 1")
    preprocess = given.get("preprocess", "alpaca")
    if preprocess not in PREPROCESSORS:
        raise ValueError(f"{where}: {unknown('preprocess', preprocess, PREPROCESSORS)}")
    prompt_type = given.get("prompt_type", "alpaca")
    if prompt_type not in PROMPT_NAMES:
        raise ValueError(f"{where}: {unknown('prompt_type', prompt_type, PROMPT_NAMES)}")
    return Source(_located(given["path"], config), float(ratio), preprocess, prompt_type)


def _located(name: str, config: Path) -> Path:
    """The file that `name` means, absolute."""
    path = Path(os.path.expanduser(name))  # Path's own raises for a user who is unknown
    candidates = list(dict.fromkeys([Path.cwd() / path, _PACKAGE / path]))  # the same one for an absolute name
    for candidate in candidates:
        if candidate.exists():
            check_data_file(candidate)
            # Not the file behind a link: in the Hub's own cache links have the suffix, and files have hashes for names.
            return candidate.parent.resolve() / candidate.name
    tried = " nor ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"the data file {name} of {config} is absent: there is no {tried}")
