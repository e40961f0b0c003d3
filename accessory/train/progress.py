"""How far a run is, for whoever watches its standard error: a bar on a terminal, now and then a line elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from accessory.train.metrics import StepMetrics

logger = logging.getLogger(__name__)

# Seconds between lines.
_INTERVAL = 10.0


class ProgressBar:
    """A bar below the package's log lines, which are written above it while it is there."""

    def __init__(self, *, total_steps: int, first_step: int) -> None:
        self._stack = contextlib.ExitStack()
        package = logging.getLogger(__name__.partition(".")[0])
        if package.handlers:
            self._stack.enter_context(logging_redirect_tqdm([package]))
        self._bar = self._stack.enter_context(
            tqdm(
                total=total_steps,
                initial=first_step,
                file=sys.stderr,
                dynamic_ncols=True,
                miniters=1,
                bar_format="{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
            )
        )

    def update(self, metrics: StepMetrics) -> None:
        """Show a step."""
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.3f}, lr {metrics.lr:.1e}, norm {metrics.grad_norm:.2f}, "
            f"{metrics.tokens_per_s:,.0f} tokens/s, {metrics.memory:.1f} GiB",
            refresh=False,
        )
        self._bar.update(metrics.step - self._bar.n)

    def close(self) -> None:
        """Leave the last step on the terminal, and log lines as they were."""
        with self._stack:
            self._bar.refresh()


class ProgressLines:
    """Log lines: one for the first and the last step, and every ten seconds at most between them.

    Args:
        clock: seconds from any origin.
    """

    def __init__(self, *, total_steps: int, first_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._first, self._clock = total_steps, first_step, clock
        self._begin = self._said_at = clock()
        self._said = first_step
        self._latest: StepMetrics | None = None

    def update(self, metrics: StepMetrics) -> None:
        """Say a step, where it is time to."""
        now = self._clock()
        if self._latest is None or metrics.step == self._total or now - self._said_at >= _INTERVAL:
            left = (now - self._begin) / (metrics.step - self._first) * (self._total - metrics.step)
            self._say(metrics, f", {duration(left)} left" if left > 0 else "")
            self._said_at = now
        if self._latest is None:
            # What the first step takes longer (allocations, compilation) says nothing about the others.
            self._begin, self._first = now, metrics.step
        self._latest = metrics

    def close(self) -> None:
        """Say the last step, where that has not been done."""
        if self._latest is not None and self._latest.step != self._said:
            self._say(self._latest, "")

    def _say(self, metrics: StepMetrics, end: str) -> None:
        logger.info("%s%s", describe(metrics, self._total), end)
        self._said = metrics.step


def describe(metrics: StepMetrics, total_steps: int) -> str:
    """A step in one line."""
    use = "" if metrics.mfu is None else f" (MFU {metrics.mfu:.1%})"
    skipped = f", skipped: gradients overflowed at loss scale {metrics.loss_scale}" if metrics.skipped else ""
    return (
        f"step {metrics.step}/{total_steps} (epoch {metrics.epoch:.2f}): loss {metrics.loss:.3f}, "
        f"balance {metrics.balance_loss:.2f}, lr {metrics.lr:.1e}, norm {metrics.grad_norm:.2f}, "
        f"{metrics.tokens_per_s:,.0f} tokens/s{use}, {metrics.memory:.1f} GiB{skipped}"
    )


def duration(seconds: float) -> str:
    """Its two largest units: "45 s", "3 min 20 s", "2 h 10 min", "1 d 3 h"."""
    whole = round(seconds)
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {part_name}"
    return f"{whole} s"
