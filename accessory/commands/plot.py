"""The command plot: finetuning runs as one picture."""

import argparse
import logging
from pathlib import Path
from typing import Any

from accessory.arguments import given_path

logger = logging.getLogger(__name__)


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    plot = commands.add_parser(
        "plot",
        help="draw finetuning runs",
        description="Draw training and held-out loss, learning rate, gradient norm, tokens/s and the share of each "
        "expert of one run or several, from their log.jsonl, as a PNG. A run may still be under way.",
        epilog="example: accessory plot runs/finetuned -o finetuned.png",
    )
    plot.add_argument("runs", type=given_path, nargs="+", metavar="RUN", help="output_dir of a run")
    help_text = "file to write (default: plot.png in the first run's folder)"
    plot.add_argument("-o", "--output", type=given_path, metavar="PNG", help=help_text)
    plot.set_defaults(run=_plot, alone="accessory plot is no work for several ranks: start one process")


def _plot(arguments: argparse.Namespace) -> None:
    from accessory.files import replacing
    from accessory.train.plot import draw_runs, read_run

    runs = [(run.name if run.is_dir() else str(run), read_run(run)) for run in arguments.runs]
    first: Path = arguments.runs[0]
    output = arguments.output or (first if first.is_dir() else first.parent) / "plot.png"
    if output.is_dir() or not output.parent.is_dir():
        wrong = "is a folder" if output.is_dir() else "lies in no folder that is there"
        raise OSError(f"--output {output} {wrong}: name a file to write")
    png = draw_runs(runs)
    with replacing(output) as aside:
        aside.write_bytes(png)
    logger.info("wrote %s", output)
