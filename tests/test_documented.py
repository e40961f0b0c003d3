"""Every option of the programs stands in the docs, under one of its spellings; what pages show, the command takes."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented import all_blocks

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


def test_every_command_that_a_page_shows_can_be_read() -> None:
    """Also those that no test runs."""
    parser, read = cli._parser(), 0
    for block in all_blocks():
        lines = block.code.replace("\\\n", " ").splitlines() if block.language == "bash" else []
        for line in lines:
            if shown := re.match(r"(?!python )(?:\S+ )*?accessory ([a-z-]+ .*)", re.split(" [|&<>]", line)[0]):
                try:
                    parser.parse_args(shlex.split(shown[1], comments=True))
                except SystemExit:
                    pytest.fail(f"{block.place}: {line}")
                read += 1
    assert read > 50
