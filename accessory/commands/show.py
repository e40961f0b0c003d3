"""The command show: finetuning data as they will be trained."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.arguments import given_name, given_number, given_path
from accessory.commands.output import show

if TYPE_CHECKING:
    from accessory.data.examples import Recipe
    from accessory.data.sources import Source
    from accessory.data.tokenise import SourceReport
    from accessory.text.chat import Segment
    from accessory.text.tokenizer import Tokenizer

_COLOURS = ("\x1b[30;42m", "\x1b[0m")  # black on green, and back
_BRACKETS = ("\u27e6", "\u27e7")
# Bytes of a file whose records are counted, which means that all of it is read.
_COUNTED = 64 << 20


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    parser = commands.add_parser(
        "show",
        help="print finetuning data as they will be trained",
        description="Print examples as main_finetune.py would train them, what is learned of each in colour (in "
        "brackets where the output is no terminal), and what is left out or cut, and why.",
        epilog="example: accessory show data.yaml --model runs/tiny/converted --limit 3",
    )
    parser.add_argument("data_config", type=given_path, metavar="DATA.yaml", help="yaml file that lists the data files")
    parser.add_argument(
        "--model",
        type=given_name,
        required=True,
        help="checkpoint folder (hf://org/name: of one on the Hub), or a tokenizer's file",
    )
    parser.add_argument("--limit", type=_count, default=5, metavar="N", help="examples of each source (default 5)")
    parser.add_argument("--tokens", action="store_true", help="list the tokens too")
    parser.add_argument("--dialog", action="store_true", help="records are dialogues; Alpaca records are refused")
    parser.add_argument(
        "--chat_template", "--chat-template", type=given_name, metavar="NAME|FILE", help="form of all prompts"
    )
    parser.add_argument(
        "--max_words", "--max-words", type=_words, default=1024, help="tokens of an example at most (default 1024)"
    )
    parser.add_argument("--ignore_fields", "--ignore-fields", default="", metavar="A,B", help="fields to pass over")
    alone = "accessory show works in one process: start it without torchrun"
    parser.set_defaults(run=_show, alone=alone)


def _show(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.hub import local_path
    from accessory.data.cache import refuse_several_forms
    from accessory.data.examples import Recipe
    from accessory.data.sources import read_data_config
    from accessory.data.tokenise import SourceReport
    from accessory.gguf_header import SUFFIX
    from accessory.serve.terminal import printable
    from accessory.text.form_files import form_for_training

    sources = read_data_config(arguments.data_config)
    model = local_path(arguments.model, weights=False)
    is_model = model.is_dir() or model.suffix == SUFFIX  # and no tokenizer's file
    tokenizer = _tokenizer(model, is_model=is_model)
    folders = [model if is_model else model.parent]
    asked = arguments.chat_template
    form = None if asked is None else form_for_training(tokenizer, folders, asked)
    ignore = frozenset(filter(None, map(str.strip, arguments.ignore_fields.split(","))))
    recipe = Recipe(tokenizer, arguments.max_words, arguments.dialog, form, ignore=ignore)
    marks = _COLOURS if sys.stdout.isatty() else _BRACKETS
    reports = [SourceReport(str(source.path)) for source in sources]
    learned = False
    for source, report in zip(sources, reports, strict=True):
        shown = 0
        try:
            shown = _show_examples(_examples(source, recipe, report, marks, tokens=arguments.tokens), arguments.limit)
        finally:  # where the file has an unknown field too, or is malformed further on
            for line in _left_out(source.path.name, report):
                show(printable(f"--- left out: {line}\n"))
            if report.bad:
                show("--- training stops at the first bad record, unless it is told --skip_bad_records\n")
        learned |= shown > 0
        show(printable(f"--- shown: {shown} {_of_how_many(source.path, shown, report)}\n"))
    refuse_several_forms(reports)
    if not learned:
        raise ValueError(
            f"{arguments.data_config} has no record that can be trained on: see what was left out, and why"
        )


def _of_how_many(path: Path, shown: int, report: "SourceReport") -> str:
    """The records of a file, as in "of 30 records", and how many nobody has looked at, where counting takes no time."""
    from accessory.data.readers import read_records

    if path.is_dir() or path.stat().st_size > _COUNTED:
        return f"records of {path.name}"
    count = sum(1 for _ in read_records(path))
    left = count - shown - report.bad - report.unanswered
    more = f"; --limit {count} looks at the other {left} too" if left > 0 else ""
    return f"of {count} records of {path.name}{more}"


def _show_examples(examples: Iterator[tuple[str, str]], limit: int) -> int:
    """Print so many examples at most; returns of how many records they are."""
    records, last = 0, ""
    for place, text in islice(examples, limit):
        records, last = records + (place != last), place
        show(text)
    return records


def _tokenizer(path: Path, *, is_model: bool) -> "Tokenizer":
    """A checkpoint's tokenizer, or that of a file; an error says what the option takes."""
    from accessory.text.tokenizer import Tokenizer

    if not path.exists():
        raise FileNotFoundError(f"--model {path} does not exist: give a checkpoint's folder, or a tokenizer's file")
    try:
        return Tokenizer(Tokenizer.find(path) or path if is_model else path)
    except ValueError as error:
        if is_model:
            raise
        raise ValueError(f"{error}, or give --model a checkpoint's folder") from None


def _left_out(name: str, report: "SourceReport") -> Iterator[str]:
    yield from (f"{name}, {fault}" for fault in report.listed)
    if report.bad > len(report.listed):
        yield f"{report.bad - len(report.listed)} more bad records of {name}"
    if report.unanswered:
        yield f"{report.unanswered} records of {name} without an answer to learn"
    if report.uninput:
        yield f'the "input" of {report.uninput} records of {name}, by their prompt_type'


def _examples(
    source: "Source", recipe: "Recipe", report: "SourceReport", marks: tuple[str, str], *, tokens: bool
) -> Iterator[tuple[str, str]]:
    """The places of records and their examples as they are printed, each of them or why it is left out."""
    from accessory.data.tokenise import usable_records
    from accessory.serve.terminal import printable

    file = printable(source.path.name)
    for record in usable_records(source, recipe, report, skip_bad_records=True):
        name = "raw text" if record.form is None else f'form "{record.form.name}"'
        for number, part in enumerate(record.parts, start=1):
            try:
                ids, labels, _ = recipe.encode(part)
            except ValueError as error:
                yield record.place, f"--- left out: {file}, {record.place}: {error}\n"
                continue
            whole = sum(len(segment.encode(recipe.tokenizer)) for segment in part)
            which = f", example {number} of {len(record.parts)}" if len(record.parts) > 1 else ""
            cut = f", cut from {whole} at --max_words {recipe.max_words}" if whole > len(ids) else ""
            lost = "; left out: nothing that is learned remains" if not labels.any() else ""
            head = f"{len(ids)} tokens, {int((labels != 0).sum())} learned{cut}{lost}"
            text = "".join(_marked(part, recipe, marks))
            listed = "".join(_listed(ids.tolist(), labels.tolist(), recipe, marks)) if tokens else ""
            yield record.place, f"--- {file}, {record.place}{which}: {head}; {name}\n{text}\n{listed}"


def _marked(part: "Sequence[Segment]", recipe: "Recipe", marks: tuple[str, str]) -> Iterator[str]:
    """The text of an example as far as it is trained, its learned pieces between marks."""
    from accessory.serve.terminal import printable

    before: list[int] = []
    marked = False
    for segment in part:
        ids = segment.encode(recipe.tokenizer)[: recipe.max_words - len(before)]
        if not ids:
            break
        if segment.learned != marked:
            yield marks[marked]
            marked = not marked
        text = segment.text
        if len(before) + len(ids) == recipe.max_words and segment.control is None:  # perhaps cut
            text = recipe.tokenizer.decode([*before, *ids])[len(recipe.tokenizer.decode(before)) :]
        before += ids
        yield printable(text)
    if marked:
        yield marks[1]


def _listed(ids: Sequence[int], labels: Sequence[int], recipe: "Recipe", marks: tuple[str, str]) -> Iterator[str]:
    for token, label in zip(ids, labels, strict=True):
        name = f"{token} {recipe.tokenizer.name(token)!r}"
        yield f"  {marks[0]}{name}{marks[1]}\n" if label else f"  {name}\n"


def _words(text: str) -> int:
    return given_number(text, 2, None, "a number of tokens of 2 or more")


def _count(text: str) -> int:
    return given_number(text, 1, sys.maxsize, "a whole number of at least 1")
