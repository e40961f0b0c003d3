"""Finetune a Mixture-of-Experts checkpoint: ``python main_finetune.py``, under torchrun or srun with many ranks.

It is the command ``accessory finetune`` by another name, whose code is in `accessory.commands.finetune`. ``--help``
lists the options; docs/finetune.md walks through a run.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and __package__ in (None, ""):
    # Started as a file, Python looks for modules in its folder first; the package is one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.commands.process import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    from accessory.commands.finetune import say, train
    from accessory.commands.output import parsed
    from accessory.launch.launcher import Launch
    from accessory.log import setup_logging
    from accessory.train.options import finetune_parser

    setup_logging()
    try:
        launch = Launch.find()
    except ValueError as error:
        say(error)
        return 1
    return train(parsed(finetune_parser(), arguments), launch)


if __name__ == "__main__":
    run(main)
