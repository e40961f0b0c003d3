"""Every option of the programs stands in the docs, under one of its spellings."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import accessory
from accessory import cli
from accessory.commands import demos
from accessory.serve.options import add_rank_arguments
from accessory.train import options

DOCS = Path(accessory.__file__).parent.parent / "docs"


def multi_turn() -> argparse.ArgumentParser:
    parser = demos._parser("multi_turn.py", "")
    add_rank_arguments(parser)
    return parser


def spellings(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """The option strings of each option, also those of commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from spellings(command)
        elif action.option_strings and "--help" not in action.option_strings:
            yield action.option_strings


@pytest.mark.parametrize(
    "parser", [cli._parser(), options.finetune_parser(), multi_turn()], ids=lambda parser: parser.prog
)
def test_options_are_documented(parser: argparse.ArgumentParser) -> None:
    written = set(re.findall(r"--[a-z][\w-]*", "\n".join(page.read_text() for page in DOCS.glob("*.md"))))
    absent = [names for names in spellings(parser) if not written & set(names)]
    assert not absent
