"""A picture of runs: their losses, learning rate, gradient norm, speed and experts, as log.jsonl tells them."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accessory.train.run_log import LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points of a line: more cannot be told apart, and of so many each is the mean of its neighbours.
_POINTS = 1000
# Experts of which each has a line of its own.
_LINES = 16
# The panels of one number for each step: its name in the log, the title, whether its axis is logarithmic.
_PANELS = (
    ("lr", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("tokens_per_s", "tokens/s", False),
)

Record = dict[str, Any]


def read_run(run: Path) -> list[Record]:
    """The lines of a run's log.

    Args:
        run: its output_dir, or the log itself.

    Raises:
        FileNotFoundError, ValueError: naming the file: there is none, or it holds no step.
    """
    path = run / LINES if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no {LINES}: name the output_dir of a finetuning run")
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that is writing it now
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    if not any("loss" in record for record in records):
        raise ValueError(f"{path} holds no step of a run: name the output_dir of a finetuning run")
    return records


def draw_runs(runs: Sequence[tuple[str, Sequence[Record]]]) -> bytes:
    """Draw runs as one PNG, each in a colour of its own.

    Args:
        runs: names, and what `read_run` gives.
    """
    # As in heatmap.py: no state that others share, and no import where nobody draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 11), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic([["loss", "loss"], ["lr", "grad_norm"], ["tokens_per_s", "experts"]])
    for number, (name, records) in enumerate(runs):
        colour = f"C{number % 10}"
        _line(panels["loss"], records, "loss", color=colour, alpha=0.5, label=name)
        held_out = _line(panels["loss"], records, "eval_loss", color=colour, marker="o", markersize=4, linestyle="--")
        if held_out:
            held_out.set_label(f"{name}, held out")
        for key, _, _ in _PANELS:
            _line(panels[key], records, key, color=colour, label=name)
        _draw_experts(panels["experts"], records, colour=colour, alone=len(runs) == 1)
    panels["loss"].set_title("loss")
    panels["experts"].set_title("share of each expert, mean over layers; least and most in any layer")
    for key, title, logarithmic in _PANELS:
        panels[key].set_title(title)
        if logarithmic:
            panels[key].set_yscale("log")
    for axes in panels.values():
        axes.set_xlabel("step")
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
    panels["loss"].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _line(axes: "Axes", records: Sequence[Record], key: str, **style: Any) -> Any:
    """A number over the steps that have it; None without any."""
    points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    if not points:
        return None
    steps, values = _thinned(points)
    return axes.plot(steps, values, linewidth=1.2, **style)[0]


def _draw_experts(axes: "Axes", records: Sequence[Record], *, colour: str, alone: bool) -> None:
    """A line for each expert (of one run in colours of their own), and a band from the lightest to the heaviest."""
    extremes = [
        (record["step"], min(share for _, share in record["lightest"]), max(share for _, share in record["heaviest"]))
        for record in records
        if record.get("lightest") and record.get("heaviest")
    ]
    if extremes:
        steps, least, most = _thinned(extremes)
        axes.fill_between(steps, least, most, color="grey" if alone else colour, alpha=0.15, linewidth=0)
    shares = [(record["step"], *record["experts"]) for record in records if record.get("experts")]
    if not shares:  # of a version before
        return
    steps, *experts = _thinned(shares)
    named = alone and len(experts) <= _LINES
    for number, share in enumerate(experts):
        style = {"label": str(number), "color": f"C{number % 10}"} if named else {"color": colour, "alpha": 0.6}
        axes.plot(steps, share, linewidth=1, **style)
    axes.axhline(1 / len(experts), color="black", linewidth=0.8, linestyle=":")
    if named:
        axes.legend(fontsize="x-small", ncols=4)


def _thinned(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """The columns of the points, of very many the means of neighbours."""
    every = math.ceil(len(points) / _POINTS)
    rows = np.asarray(points, dtype=np.float64)
    means = [rows[begin : begin + every].mean(0) for begin in range(0, len(rows), every)]
    return np.stack(means, axis=1).tolist()
