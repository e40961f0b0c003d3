"""The command line: ``accessory COMMAND``.

Under torchrun `generate` shares a model among the ranks; results come from rank 0 alone. The other commands work in one
process, or start their ranks themselves, and refuse to be started many times over. Bad input ends with one line on
standard error and exit code 1 on every rank.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from accessory.arguments import Parser
from accessory.commands import chat, checkpoints, generate, serve, show
from accessory.commands.output import ended, say
from accessory.launch.launcher import Launch
from accessory.log import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    setup_logging()
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as error:
        if error.code and "RANK" in os.environ and Launch.find().world_size > 1:
            from accessory.launch.rendezvous import refuse_together

            refuse_together("its arguments are wrong")
        raise
    return ended(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    """Run the command; one that is no work for several ranks is refused, once, where torchrun started several.

    A batch script of SLURM has the variables of a rank as well, though it is one process.
    """
    alone: str | None = getattr(arguments, "alone", None)
    if alone is not None and "RANK" in os.environ and Launch.find().world_size > 1:
        from accessory.launch.rendezvous import process_group_of_launcher
        from accessory.parallel.state import on_all_ranks

        with process_group_of_launcher("cpu", say=say):
            raise on_all_ranks(ValueError(alone))
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="accessory", description="Mixture-of-Experts inference and finetuning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in (checkpoints, generate, chat, serve, show):
        part.add_commands(commands)
    return parser
