"""The command line: ``accessory COMMAND``.

A command works on the ranks that torchrun or srun has started, or on `--nproc` ranks of its own; results come from
rank 0 alone. One that is no work for several ranks, or starts them in another way, says so (`alone`) and refuses to
be started many times over. Bad input ends with one line on standard error and exit code 1 on every rank.
"""

import argparse
import sys
from collections.abc import Sequence

from accessory import __version__
from accessory.arguments import Parser
from accessory.commands import chat, checkpoints, evaluate, finetune, generate, plan, plot, serve, show
from accessory.commands.output import ended, parsed, refuse
from accessory.launch.launcher import Launch
from accessory.log import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    setup_logging()
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    arguments = parsed(parser, argv)
    return ended(lambda: _run(arguments, argv))


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run the command, here or on ranks that are started for it.

    One that is no work for several ranks is refused, once, where a launcher started several.
    """
    alone: str | None = getattr(arguments, "alone", None)
    ranks = getattr(arguments, "ranks", None) or 1
    if alone is not None:
        if Launch.find().has_others:
            refuse(ValueError(alone))
    elif ranks > 1:
        from accessory.launch.local import run_on_ranks, starts_ranks

        try:
            starts = starts_ranks(ranks)
        except ValueError as error:
            refuse(error)
        if starts:
            raise SystemExit(run_on_ranks(ranks, argv, device=arguments.device))
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="accessory", description="Mixture-of-Experts inference and finetuning.")
    parser.add_argument("--version", action="version", version=f"accessory {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in (checkpoints, generate, finetune, evaluate, plan, plot, chat, serve, show):
        part.add_commands(commands)
    return parser
