"""Turn the datasets of the Hub into the data files that the finetuning's yaml names.

    python -m accessory.tools.prepare_data ultrachat ultrachat_200k/data ../data/ultrachat_200k_train_sft.json
    python -m accessory.tools.prepare_data evol-codealpaca train.jsonl ../data/evol-codealpaca-v1/wizardCode.json

SRC is a file (.parquet, .json, .jsonl or .csv) or a folder of them, read in the order of their names. A folder
of ultrachat that holds several splits gives its train_sft files only. DST becomes a JSON list of dialogues, one
a line; it is written aside and renamed. Texts are kept as they are, and a system message is a turn from "system".
Records that are no dialogue, or have no answer, are left out and counted.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accessory.arguments import Parser, given_name
from accessory.data.readers import READERS, Record, read_records
from accessory.data.records import Instruction, Talk, read_said
from accessory.files import parents_of, replacing
from accessory.log import say_error, setup_logging
from accessory.progress import showing
from accessory.text.chat import Message

_LISTED = 5  # left out records that are named; the others are counted
_SPLIT = "train_sft"
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}

Messages = tuple[Message, ...]
Turns = list[dict[str, Any]]
logger = logging.getLogger("accessory.tools.prepare_data")  # __name__ is __main__ when it runs


@dataclass
class Outcome:
    """What a conversion wrote, and what it left out: `listed` names the first of these."""

    written: int = 0
    left_out: int = 0
    listed: list[str] = field(default_factory=list)


def convert_data(kind: str, source: str | Path, target: str | Path) -> Outcome:
    """Convert `source`, a file or folder of the dataset `kind` (a name of DATASETS), to the JSON list `target`.

    Raises FileNotFoundError or ValueError, which name the file, where there is nothing to convert, where a file is
    malformed and where no record is usable; `target` is then left as it was.
    """
    if kind not in DATASETS:
        raise ValueError(f"unknown dataset {kind!r}: take one of {', '.join(DATASETS)}")
    files = data_files(Path(source), split=_SPLIT if kind == "ultrachat" else None)
    path = Path(target)
    if path.is_dir() or path.suffix != ".json":
        raise ValueError(f"DST is {path}: name the .json file to write")
    if path.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"{path} is to be read and written: give another DST")
    outcome = Outcome()
    with parents_of(path), replacing(path) as aside:
        with aside.open("w", encoding="utf-8") as out:
            for turns in _dialogues(files, DATASETS[kind], outcome):
                out.write(",\n" if outcome.written else "[\n")
                json.dump({"conversations": turns}, out, ensure_ascii=False)
                outcome.written += 1
            out.write("\n]\n")
        if not outcome.written:
            raise ValueError(
                f"no record of {source} is a usable dialogue of {kind}: {outcome.listed[:1] or 'no record'}"
            )
    return outcome


def data_files(source: Path, *, split: str | None) -> list[Path]:
    """The data files that `source` is or, as a folder or in its folder data/, holds; those of `split`, if any."""
    if not source.is_dir():
        return [source]  # read_records says what is wrong with it
    for folder in (source, source / "data"):
        found = sorted(file for file in folder.glob("*") if file.suffix.lower() in READERS and file.is_file())
        if found:
            break
    else:
        raise FileNotFoundError(f"{source} holds no data file: it takes {', '.join(READERS)}")
    chosen = [file for file in found if split is not None and file.name.startswith(split)] or found
    if len(chosen) < len(found):
        others = ", ".join(file.name for file in found if file not in chosen)
        logger.info("only the files of %s are taken; left are %s", split, others)
    return chosen


def _dialogues(files: Sequence[Path], read: Callable[[dict[str, Any]], Messages], outcome: Outcome) -> Iterator[Turns]:
    """The dialogues of the files' records; `outcome` counts the others."""
    for file in files:
        with showing(f"reading {file.name}", unit="records") as reading:
            for record in reading.over(read_records(file)):
                try:
                    yield _dialogue(record, read)
                except ValueError as error:
                    outcome.left_out += 1
                    if len(outcome.listed) < _LISTED:
                        outcome.listed.append(f"{file}, {record.place}: {error}")


def _dialogue(record: Record, read: Callable[[dict[str, Any]], Messages]) -> Turns:
    """The record's turns, which the finetuning reads as they are. ValueError with the reason for a bad record."""
    if record.fault is not None:
        raise ValueError(record.fault)
    if not isinstance(record.value, dict):
        raise ValueError("it is not an object")
    messages = read(record.value)
    if not any(message.taught for message in messages):
        raise ValueError("it has no answer")
    try:
        "".join(message.text for message in messages).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is no character") from None
    return [_turn(message) for message in messages]


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"from": _SPEAKERS[message.role], "value": message.text}
    if message.name is not None:
        turn["name"] = message.name
    return turn if message.learned or not message.content.strip() else {**turn, "weight": 0}


def _ultrachat(record: dict[str, Any]) -> Messages:
    """ultrachat_200k: {"messages": [{"role", "content"}, ...]}, beside a prompt that repeats the first one."""
    if record.get("messages") is None:
        raise ValueError("it has no 'messages'")
    said = read_said(record)
    return said.messages if isinstance(said, Talk) else ()


def _evol_codealpaca(record: dict[str, Any]) -> Messages:
    """evol-codealpaca-v1: {"instruction", "output"}, and what else an Alpaca record may say."""
    for key in ("instruction", "output"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"it has no string under {key!r}")
    said = read_said(record)
    return said.messages if isinstance(said, Instruction | Talk) else ()


DATASETS: dict[str, Callable[[dict[str, Any]], Messages]] = {
    "ultrachat": _ultrachat,
    "evol-codealpaca": _evol_codealpaca,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    parser = Parser(prog="accessory.tools.prepare_data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dataset", choices=DATASETS, help="which dataset SRC holds")
    parser.add_argument("source", metavar="SRC", type=given_name, help="its file, or the folder of its files")
    parser.add_argument("target", metavar="DST", type=given_name, help="the .json file to write")
    given = parser.parse_args(arguments)
    setup_logging()
    try:
        outcome = convert_data(given.dataset, given.source, given.target)
    except (OSError, ValueError) as error:
        say_error(str(error))
        return 1
    if outcome.left_out:
        logger.warning("%d records are left out, the first of them:", outcome.left_out)
        for line in outcome.listed:
            logger.warning("  %s", line)
    sys.stdout.write(f"wrote {outcome.written} dialogues to {given.target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
