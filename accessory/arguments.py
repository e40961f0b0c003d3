"""The parser of all programs, and kinds of arguments that several take, each refusing what cannot be meant."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from accessory.errors import nearest
from accessory.launch.launcher import report_failure
from accessory.log import global_rank


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line, once, however many ranks were started with it.

    An unknown option or command is said first, with the known one that is nearest: what argparse would complain of, a
    required option, is then mostly the one that was misspelt. What is missing is said of all that is.

    Attributes:
        needed: options of which one at least must be given, though the parser lets it pass: whoever looks at them says
            more than it can. It names the first, and the others as well, beside what it misses itself.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.needed: list[tuple[str, ...]] = []
        self._given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self._given = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown(self._given)
        found, more = super().parse_known_args(args, namespace)
        if more:  # said by the command's own parser, which knows what it takes
            taken = [str(own.metavar or own.dest).upper() for own in self._get_positional_actions()]
            self.error(f"{' '.join(more)} is one too many: {self.prog} takes {' and '.join(taken) or 'options alone'}")
        return found, more

    def print_help(self, file: Any = None) -> None:
        if global_rank() == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; rank 0 says why."""
        if message.startswith("the following"):
            message = ", ".join([message, *self._missing()])
        where = (
            f"; see {self.prog} --help"
            if message.startswith(("unknown option", "the following", "one of the arg")) or "too many" in message
            else ""
        )
        text = f"{self.prog}: error: {message}{where}"
        report_failure(text)
        self.exit(2, f"{text}\n" if global_rank() == 0 else None)

    def _missing(self) -> Iterator[str]:
        """Options of which one must be given, and none is, each with those that may stand in its place."""
        exclusive = [
            tuple(action.option_strings[0] for action in group._group_actions)
            for group in self._mutually_exclusive_groups
            if group.required
        ]
        given = [option for option, _ in self._options_among(self._given)]
        for names in (*exclusive, *self.needed):
            if not any(name.startswith(option) for option in given for name in names):
                yield names[0] + (f" (or {', '.join(names[1:])})" if names[1:] else "")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            what = "unknown command" if isinstance(action, argparse._SubParsersAction) else "unknown value"
            message = f"{what} {value!r}{nearest(value, known)}: choose from {', '.join(known)}"
            raise argparse.ArgumentError(action if what == "unknown value" else None, message)

    def _refuse_unknown(self, given: Sequence[str]) -> None:
        known = list(self._option_string_actions)
        for option, before in self._options_among(given):
            if option in known or sum(name.startswith(option) for name in known) == 1:
                continue
            if sum(name.startswith(option) for name in known) == 0:
                takes = self._option_string_actions.get(before)
                value = f"; a value that begins so is given as {before}={option}" if takes and takes.nargs != 0 else ""
                self.error(f"unknown option {option}{nearest(option, known)}{value}")

    def _options_among(self, given: Sequence[str]) -> Iterator[tuple[str, str]]:
        """What argparse reads as options, without their values, and what stands before each.

        Behind the first word that is none it is a command's own, if this parser has commands.
        """
        commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for before, text in zip(("", *given), given, strict=False):
            if text == "--" or (commands and not text.startswith("-")):
                return
            if len(text) > 1 and text[0] == "-" and " " not in text and not self._negative_number_matcher.match(text):
                yield text.partition("=")[0], before


def given_name(text: str) -> str:
    """A name that is not empty. As a path an empty one is the current folder, as a host it is every address."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name was given: is a variable of your script not set?")
    return text


def given_path(text: str) -> Path:
    """A path, in the same way."""
    return Path(given_name(text))


def given_destination(text: str) -> Path:
    """The path of a folder to write: on this machine."""
    if text.startswith("hf:"):
        raise argparse.ArgumentTypeError(
            f"{text!r} given: the Hub is only read, so name a folder here (`hf upload` brings it there)"
        )
    return given_path(text)


def given_number(text: str, least: int, most: int | None, fit: str) -> int:
    """A whole number within bounds; ``fit`` says in words what to give."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise argparse.ArgumentTypeError(f"{text!r} given: give {fit}")
    return value


def given_count(text: str) -> int:
    """How many of something there are to be."""
    return given_number(text, 1, None, "a whole number of at least 1")


def given_seed(text: str) -> int:
    """What `torch.manual_seed` takes."""
    return given_number(text, -(2**63), 2**64 - 1, "a whole number from -2^63 to 2^64 - 1")


def add_nproc_argument(parser: argparse.ArgumentParser) -> None:
    """How many ranks of this host a command starts itself."""
    help_text = "processes to start on this host, one for each GPU; without GPUs they share the CPU (default 1)"
    parser.add_argument(
        "--nproc", "--n_gpus", "--n-gpus", dest="ranks", type=given_count, default=1, metavar="N", help=help_text
    )


def add_threads_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """How many threads a rank has on the processor; see `launch.threads.settle_count`."""
    help_text = "threads of each rank on the processor (default: its share of the cores; under torchrun 1)"
    parser.add_argument("--threads", type=given_count, metavar="N", help=help_text)
