"""Finetune a Mixtral checkpoint: ``python main_finetune.py``, under torchrun or srun with many ranks.

It is the command ``accessory finetune`` by another name, whose code is in `accessory.commands.finetune`. ``--help``
lists the options; docs/finetune.md walks through a run.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and __package__ in (None, ""):
    # Started as a file, Python looks for modules in its folder first; the package is one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.commands.finetune import say, train
from accessory.launch.launcher import Launch
from accessory.log import setup_logging
from accessory.train.options import finetune_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    setup_logging()
    try:
        launch = Launch.find()
    except ValueError as error:
        say(error)
        return 1
    try:
        given = finetune_parser().parse_args(arguments)
    except SystemExit as error:
        if error.code and launch.has_others:
            from accessory.launch.rendezvous import refuse_together

            refuse_together("its arguments are wrong")
        return int(error.code or 0)
    return train(given, launch)


if __name__ == "__main__":
    code = main()
    # Threads that wait for a rank which is gone must not hold this one back.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
