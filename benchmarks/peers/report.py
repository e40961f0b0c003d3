"""What a comparison found, as tables in Markdown and as a picture; both of the JSON that it writes."""

import io
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

OURS, REFERENCE = "accessory", "accessory bf16"
# What a format of ours is held against: the peer's of as many bits.
RIVALS = {"int8": "Q8_0", "int4": "Q4_0", "nf4": "Q4_K_M"}
# Of fresh processes: the key, what the row is called, and the unit with its size.
STARTS = (
    ("load", "loading, s", 1.0),
    ("first", "first token of a fresh process, s", 1.0),
    ("peak_private", "peak while loading, private, MB", 1e6),
    ("peak_resident", "peak while loading, with mapped files, MB", 1e6),
)


def tables(results: dict[str, Any]) -> list[str]:
    """Lines of Markdown: of each part the medians with their ranges, and ours beside the best peer."""
    head = f"{results['cpu']}, {results['threads']} threads, {results['system']}, Python {results['python']}"
    return [f"{head}, {results['date']}", *(line for part in results["parts"] for line in _part(part))]


def _part(part: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {part['shape']}, {part['group']}\n"
    yield from (f"- {name}: {side['about']}" for name, side in part["sides"].items() if "about" in side)
    yield from (f"- {name}, {row}: not measured, {reason}" for name, row, reason in part["missing"])
    if part["limits"]:
        read, dense = (max(own[key] for own in part["limits"]) for key in ("read", "dense"))
        best = f"best of {len(part['limits'])} rounds"
        yield f"- the machine: reads {read / 1e9:.1f} GB/s, multiplies {dense / 1e12:.2f} TFLOP/s; {best}"
    names = list(dict.fromkeys(name for row in part["rows"] for name in row["seconds"]))
    started = [name for name, side in part["sides"].items() if side.get("load")]
    if not names:
        return
    yield "\nMilliseconds of a prompt or a step: the median, and the least and the most of the rounds.\n"
    yield from _table(["", *names], ([row["name"], *_cells(row, names)] for row in part["rows"]))
    yield "\nFresh processes.\n"
    sides = [part["sides"][name] for name in started]
    rows = ([label, *(_range(side[key], unit) for side in sides)] for key, label, unit in STARTS)
    yield from _table(["", *started], rows)
    yield "\nRatios are of the same round: the peer's time by ours, so that above 1 ours is faster.\n"
    columns = ["", "ours", "best peer", "ratio", "of the limit, ours", "theirs", "MB a step, ours", "theirs"]
    yield from _table(columns, _compared(part))


def _compared(part: dict[str, Any]) -> Iterator[list[str]]:
    """Ours beside the best peer, row by row: then each quantized format beside our bfloat16."""
    for row in part["rows"]:
        for ours, peers in _pairs(row["seconds"]):
            best = min(peers, key=lambda name: statistics.median(row["seconds"][name]))
            shares = (_share(part, row, name) for name in (ours, best))
            read = row.get("read", {})
            reads = (f"{read[name] / 1e6:,.0f}" if name in read else "" for name in (ours, best))
            yield [row["name"], ours, best, _ratio(row, ours, best), *shares, *reads]


def _pairs(seconds: dict[str, list[float]]) -> Iterator[tuple[str, list[str]]]:
    """What of ours is held against which others."""
    formats = {form: f"{OURS} {form}" for form in RIVALS if f"{OURS} {form}" in seconds}
    pairs = [(REFERENCE, [name for name in seconds if not name.startswith(OURS)])] if not formats else []
    for form, ours in formats.items():
        pairs += [(ours, [name for name in seconds if name.endswith(f" {RIVALS[form]}")])]
        pairs += [(ours, [name for name in seconds if name == REFERENCE])]
    yield from ((ours, peers) for ours, peers in pairs if peers and ours in seconds)


def ratios(row: dict[str, Any], ours: str, theirs: str) -> list[float]:
    """Their time by ours, round by round."""
    return [their / own for own, their in zip(row["seconds"][ours], row["seconds"][theirs], strict=False)]


def _ratio(row: dict[str, Any], ours: str, theirs: str) -> str:
    found = ratios(row, ours, theirs)
    return f"{statistics.median(found):.2f} x ({min(found):.2f}-{max(found):.2f})"


def _share(part: dict[str, Any], row: dict[str, Any], name: str) -> str:
    """How much of what the machine reads or multiplies the median reaches."""
    key, work = ("dense", row["flops"]) if "flops" in row else ("read", row.get("read", {}).get(name))
    if not work or not part["limits"]:
        return ""
    return f"{work / statistics.median(row['seconds'][name]) / max(own[key] for own in part['limits']):.2f}"


def _cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [_range(row["seconds"].get(name, []), 1e-3) for name in names]


def _range(values: Sequence[float], unit: float) -> str:
    if not values:
        return ""
    middle, least, most = (value / unit for value in (statistics.median(values), min(values), max(values)))
    digits = 0 if least >= 100 else 1 if least >= 10 else 2
    return f"{middle:,.{digits}f} ({least:,.{digits}f}-{most:,.{digits}f})"


def _table(columns: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def draw(results: dict[str, Any]) -> bytes:
    """A PNG: of each part a panel with every side's speed beside ours in bfloat16, and the range of the rounds."""
    # As accessory/train/plot.py: no state that others share.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in results["parts"] if any(REFERENCE in row["seconds"] for row in part["rows"])]
    figure = Figure(figsize=(12, 4 * max(len(parts), 1)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, part in enumerate(parts):
        axes = figure.add_subplot(len(parts), 1, panel + 1)
        rows = [row for row in part["rows"] if REFERENCE in row["seconds"]]
        names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            places, heights, below, above = [], [], [], []
            for place, row in enumerate(rows):
                if name in row["seconds"]:
                    speeds = [1 / ratio for ratio in ratios(row, REFERENCE, name)]
                    middle = statistics.median(speeds)
                    places.append(place + (number - (len(names) - 1) / 2) * width)
                    heights.append(middle)
                    below.append(middle - min(speeds))
                    above.append(max(speeds) - middle)
            axes.bar(places, heights, width, yerr=(below, above), label=name, error_kw={"linewidth": 0.6})
        axes.axhline(1.0, color="black", linewidth=0.6)
        labels = [row["name"].replace(", ", "\n") for row in rows]
        axes.set_xticks(range(len(rows)), labels, fontsize="small")
        axes.set_ylabel("speed, ours in bf16 = 1")
        axes.set_title(
            f"{part['shape']}, {part['group']}: {results['cpu']}, {results['threads']} threads, {results['date']}"
        )
        axes.legend(fontsize="small", ncols=len(names))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
