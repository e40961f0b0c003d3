"""A web page that holds a dialogue.

    python demos/multi_turn.py --n_gpus 2 --pretrained_path PATH

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
    from accessory.commands.demos import multi_turn

    return multi_turn()


if __name__ == "__main__":
    run(main)
