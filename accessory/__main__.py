"""The command ``accessory``, and ``python -m accessory``, which torchrun starts on every rank."""

from typing import NoReturn

from accessory.commands.process import run


def main() -> NoReturn:
    """Run the command that the process was given."""
    run(_program)


def _program() -> int:
    from accessory import cli

    return cli.main()


if __name__ == "__main__":
    main()
