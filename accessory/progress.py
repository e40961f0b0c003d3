"""How far a long work is, for whoever watches standard error: a bar on a terminal, now and then a line elsewhere.

The lines go to the log, every ten seconds or so: a work that is over by then says nothing. tqdm is imported where a bar
is drawn, so that commands which draw none begin sooner.
"""

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

# Seconds between lines.
INTERVAL = 10.0
# What the first advances take tells little of the rest: they open files, allocate, compile, or are the largest. Nothing
# is said of the pace before as many more have been measured, or for so many seconds.
_FEW, _ENOUGH = 3, 10.0
# The pace is that of the last seconds, or of the last marks where these are further back; a mark is set once a second.
_RECENT, _MARKS, _APART = 60.0, 10, 1.0

Item = TypeVar("Item")
Clock = Callable[[], float]


class Progress:
    """Work that is counted, in a context in which it is done; of itself it shows nothing."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """So much more of it is done; ``note``: what else is to be said of where it is."""

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


def showing(what: str, total: int | None = None, *, unit: str, done: int = 0, shown: bool = True) -> Progress:
    """Show how far a work is.

    Args:
        what: the work, such as "splitting into 8".
        total: units in all; None where nobody knows.
        unit: of the counting, in the plural.
        done: units that were done before.
        shown: False shows nothing, say on other ranks than the first.
    """
    if not shown:
        return Progress()
    return _Bar(what, total, unit, done) if sys.stderr.isatty() else Lines(what, total, unit=unit, done=done)


class Pace:
    """How fast a work goes, and when it is time to say so.

    Args:
        total: units in all; None where nobody knows.
        done: units that were done before.
        clock: seconds from any origin.
    """

    def __init__(self, total: int | None, *, done: int = 0, clock: Clock = time.monotonic) -> None:
        self.total, self.done, self._clock = total, done, clock
        self._begin = self._said_at = self._at = clock()
        self._advances = 0
        self._marks: deque[tuple[float, int, int]] = deque()  # when so much was done, in so many advances

    def advance(self, count: int) -> None:
        """So much more is done."""
        self.done += count
        self._advances += 1
        self._at = self._clock()
        marks = self._marks
        if self._advances <= _FEW and self.rate is None:
            marks.clear()
        if not marks or self._at - marks[-1][0] >= _APART:
            marks.append((self._at, self.done, self._advances))
        while len(marks) > _MARKS and self._at - marks[1][0] >= _RECENT:
            marks.popleft()

    @property
    def due(self) -> bool:
        """Whether it is time to say how far the work is."""
        return self._clock() - self._said_at >= INTERVAL

    def said(self) -> None:
        """It has been said."""
        self._said_at = self._clock()

    @property
    def seconds(self) -> float:
        """Since the begin."""
        return self._clock() - self._begin

    @property
    def rate(self) -> float | None:
        """Units a second, of late; None before enough is done to tell."""
        at, done, advances = self._marks[0] if self._marks else (self._at, self.done, self._advances)
        seconds = self._at - at
        told = self._advances - advances >= _FEW or seconds >= _ENOUGH
        return (self.done - done) / seconds if told and self.done > done and seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes at this pace; None where nobody knows."""
        return None if self.total is None or self.rate is None else (self.total - self.done) / self.rate


class Lines(Progress):
    """Log lines every ten seconds or so; the end is said where the way there was.

    Args:
        clock: seconds from any origin.
    """

    def __init__(
        self, what: str, total: int | None, *, unit: str, done: int = 0, clock: Clock = time.monotonic
    ) -> None:
        self._what, self._unit, self._pace = what, unit, Pace(total, done=done, clock=clock)
        self._spoke, self._note = False, ""

    def advance(self, count: int = 1, note: str = "") -> None:
        self._pace.advance(count)
        self._note = f"; {note}" if note else ""
        if self._pace.due and self._pace.done != self._pace.total:
            rate, left = self._pace.rate, self._pace.left
            how_fast = "" if rate is None else f", {in_digits(rate)} a second"
            how_long = "" if left is None else f", {duration(left)} left"
            self._say(how_fast + how_long)
            self._pace.said()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._spoke and error is None:
            self._say(f" in {duration(self._pace.seconds)}")

    def _say(self, end: str) -> None:
        of_all = "" if self._pace.total is None else f" of {self._pace.total:,}"
        logger.info("%s: %s%s %s%s%s", self._what, f"{self._pace.done:,}", of_all, self._unit, end, self._note)
        self._spoke = True


class _Bar(Progress):
    """A bar of tqdm."""

    def __init__(self, what: str, total: int | None, unit: str, done: int) -> None:
        self._stack = contextlib.ExitStack()
        self._bar = bar(self._stack, desc=what, total=total, unit=f" {unit}", initial=done, leave=False)

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()


def bar(stack: contextlib.ExitStack, **settings: Any) -> "tqdm[None]":
    """A bar of tqdm on standard error, until the stack is closed; the package's log lines are written above it.

    Its rate and the time left are `Pace`'s: tqdm's own begin with what the first steps took.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    pace = Pace(settings.get("total"), done=settings.get("initial", 0))

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            pace.advance(int(n or 0))
            return super().update(n)

        @property
        def format_dict(self) -> MutableMapping[str, Any]:
            return {**super().format_dict, "rate": pace.rate or 0.0}  # 0 is shown as ?

    package = logging.getLogger(__name__.partition(".")[0])
    if package.handlers:
        stack.enter_context(logging_redirect_tqdm([package]))
    return stack.enter_context(Bar(file=sys.stderr, dynamic_ncols=True, **settings))


def duration(seconds: float) -> str:
    """Its two largest units: "45 s", "3 min 20 s", "2 h 10 min", "1 d 3 h"."""
    whole = round(seconds)
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {part_name}"
    return f"{whole} s"


def in_digits(rate: float) -> str:
    """A rate with as many digits as it deserves: "0.034", "7.2", "1,204"."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
