"""The command line: ``accessory COMMAND``.

Under torchrun, commands that run a model share it among the ranks; results come from rank 0 alone. Bad input ends
with one line on standard error and exit code 1 on every rank.
"""

import argparse
import os
from collections.abc import Sequence

from accessory.commands import chat, checkpoints, generate, serve
from accessory.commands.output import ended
from accessory.launch import Launch
from accessory.log import RankParser, setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    setup_logging()
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as error:
        if error.code and "RANK" in os.environ and Launch.find().world_size > 1:
            from accessory.parallel.rendezvous import refuse_together

            refuse_together("its arguments are wrong")
        raise
    return ended(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = RankParser(prog="accessory", description="Mixture-of-Experts inference and finetuning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in (checkpoints, generate, chat, serve):
        part.add_commands(commands)
    return parser
