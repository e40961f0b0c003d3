"""A web page that answers one instruction at a time.

    torchrun --nproc-per-node=2 --master-port=23456 demos/single_turn.py --pretrained_path PATH

docs/demos.md shows the page; ``--help`` lists the arguments.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Started as a file, Python looks for modules in its folder first; the package is one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.commands.process import run


def main() -> int:
    """Run; returns the exit code."""
    from accessory.commands.demos import single_turn

    return single_turn()


if __name__ == "__main__":
    run(main)
