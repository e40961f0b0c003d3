"""How far a work is: a bar where somebody sits at a terminal, now and then a line elsewhere, nothing for short work."""

import ast
import logging
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

import accessory
from accessory.progress import Lines, Pace, duration, in_digits, showing

ROOT = Path(accessory.__file__).parent

# So many units, each of which takes a second of a clock that the code sets.
WORK = """
import logging, sys
from accessory.log import setup_logging
from accessory.progress import showing
setup_logging()
with showing("counting", 40, unit="things") as work:
    for number in work.over(range(40)):
        if number == 20:
            logging.getLogger("accessory.tools").info("half of it")
sys.stderr.write("over\\n")
"""


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="accessory.progress")
    return caplog


def said(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records]


def test_a_line_every_ten_seconds_says_what_how_far_how_fast_and_what_is_left(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with Lines("training", 2400, unit="steps", clock=clock) as work:
        for _ in range(2400):
            clock.now += 0.125
            work.advance(note="loss 3.21")
    lines = said(log)
    assert len(lines) == 30
    assert lines[0] == "training: 80 of 2,400 steps, 8 a second, 4 min 50 s left; loss 3.21"
    assert lines[-1] == "training: 2,400 of 2,400 steps in 5 min 0 s; loss 3.21"


def test_short_work_says_nothing(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with Lines("merging", 5, unit="tensors", clock=clock) as work:
        for _ in work.over(range(5)):
            clock.now += 1.9
    assert not said(log)


def test_work_that_goes_on_counts_its_pace_from_where_it_began_again(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    work = Lines("training", 2400, unit="steps", done=2000, clock=clock)
    for _ in range(2):
        clock.now += 20
        work.advance(10)
    assert said(log) == [
        "training: 2,010 of 2,400 steps",
        "training: 2,020 of 2,400 steps, 0.5 a second, 12 min 40 s left",
    ]


# Seconds of each unit, and what is said to be left after so many of them; "" where nothing is.
@pytest.mark.parametrize(
    ("seconds", "left"),
    [
        ([60], ""),
        ([60, 1], ""),
        ([60, 1, 1, 1], ""),
        ([60, 5, 2, 1, 1, 1], "1 min 34 s"),  # the first three tell nothing
        ([60, 20], "32 min 40 s"),  # slow ones tell sooner
        ([60, *[1] * 40, *[2] * 50], "20 s"),  # at the pace of late
    ],
)
def test_the_time_left_is_that_at_the_pace_of_late(seconds: list[float], left: str) -> None:
    clock = Clock()
    pace = Pace(100 if len(seconds) < 90 else 101, clock=clock)
    for each in seconds:
        clock.now += each
        pace.advance(1)
    assert ("" if pace.left is None else duration(pace.left)) == left


def test_work_without_a_known_end_says_how_far_it_is(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with Lines("checking a.json", None, unit="records", clock=clock) as work:
        for _ in range(12):
            clock.now += 1
            work.advance(1200)
    assert said(log) == [
        "checking a.json: 12,000 records, 1,200 a second",
        "checking a.json: 14,400 records in 12 s",
    ]


def test_work_that_fails_does_not_say_that_it_is_over(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()

    def tensors() -> Iterator[int]:
        clock.now += 11
        yield 1
        raise ValueError("spoilt")

    work = Lines("splitting", 9, unit="tensors", clock=clock)
    with pytest.raises(ValueError, match="spoilt"), work:
        list(work.over(tensors()))
    assert len(said(log)) == 1


def test_nothing_is_shown_where_another_rank_shows_it(log: pytest.LogCaptureFixture) -> None:
    with showing("quantizing", 3, unit="matrices", shown=False) as work:
        assert list(work.over("abc")) == ["a", "b", "c"]
    assert not said(log)


def on_a_terminal(code: str) -> str:
    """What a program writes to a terminal of 80 columns that is its standard error."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs) as process:
        os.close(theirs)
        text = b""
        with os.fdopen(ours, "rb", buffering=0) as terminal:
            try:
                while part := terminal.read(4096):
                    text += part
            except OSError:  # the other side is closed
                pass
        assert process.wait() == 0, text
    return text.decode()


def test_a_terminal_gets_a_bar_with_log_lines_above_it_and_it_goes_when_the_work_is_over() -> None:
    text = on_a_terminal(WORK)
    assert "counting:" in text
    assert "/40" in text
    assert "INFO: half of it\r\n" in text
    assert text.endswith("over\r\n")
    assert "a second" not in text


def test_no_module_draws_bars_by_itself() -> None:
    """One that did would write a line for each step into a file, or import tqdm for a command that draws none."""
    importers = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any((getattr(node, "module", None) or name.name).startswith("tqdm") for name in node.names)
    }
    assert importers == {"progress.py"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7800, "2 h 10 min"), (97300, "1 d 3 h")],
)
def test_durations_are_rounded_to_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(0.0341, "0.034"), (7.24, "7.2"), (10.4, "10"), (1204.4, "1,204")])
def test_rates_have_the_digits_that_they_deserve(rate: float, text: str) -> None:
    assert in_digits(rate) == text
