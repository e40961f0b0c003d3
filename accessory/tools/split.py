"""Convert a released consolidated.00.pth into shards, in the folder where it lies.

Put this file beside consolidated.00.pth, params.json and tokenizer.model and run it there:

    python split.py            # writes converted/ with 8 shards
    python split.py --mp 4

It is `accessory split . converted --mp N`, so the package must be installed.
"""

import sys
from pathlib import Path

try:
    from accessory.arguments import Parser
    from accessory.checkpoint.convert import split
    from accessory.log import say_error
except ImportError as error:
    sys.exit(f"split.py needs the accessory package ({error}): run it with the Python where it is installed")


def main() -> int:
    """Split; returns the exit code."""
    parser = Parser(description="Split consolidated.00.pth into converted/.")
    parser.add_argument("--mp", type=int, default=8, help="number of shards (default 8)")
    arguments = parser.parse_args()
    here = Path.cwd()
    folder = here if (here / "consolidated.00.pth").exists() else Path(__file__).resolve().parent
    try:
        split(folder, folder / "converted", mp=arguments.mp)
    except (OSError, ValueError) as error:
        say_error(str(error))
        return 1
    sys.stdout.write(f"wrote {folder / 'converted'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
