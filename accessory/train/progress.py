"""How far a run is: a bar on a terminal, now and then a line elsewhere, each with what was measured."""

import contextlib
import logging
import time

from accessory.progress import Clock, Pace, bar, duration
from accessory.train.metrics import StepMetrics

logger = logging.getLogger(__name__)


class ProgressBar:
    """A bar below the package's log lines, which are written above it while it is there."""

    def __init__(self, *, total_steps: int, first_step: int) -> None:
        self._stack, self._held_out = contextlib.ExitStack(), ""
        self._bar = bar(
            self._stack,
            total=total_steps,
            initial=first_step,
            miniters=1,
            bar_format="{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
        )

    def update(self, metrics: StepMetrics) -> None:
        """Show a step."""
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.3f}, lr {metrics.lr:.1e}, norm {metrics.grad_norm:.2f}, "
            f"{speed(metrics)}, {metrics.memory:.1f} GiB{self._held_out}",
            refresh=False,
        )
        self._bar.update(metrics.step - self._bar.n)

    def held_out(self, loss: float) -> None:
        """Show an evaluation's loss from the next step on."""
        self._held_out = f", held-out {loss:.3f}"

    def close(self) -> None:
        """Leave the last step on the terminal, and log lines as they were."""
        with self._stack:
            self._bar.refresh()


class ProgressLines:
    """Log lines: one for the first and the last step, and every ten seconds at most between them.

    Args:
        clock: seconds from any origin.
    """

    def __init__(self, *, total_steps: int, first_step: int, clock: Clock = time.monotonic) -> None:
        self._pace = Pace(total_steps, done=first_step, clock=clock)
        self._total, self._said = total_steps, first_step
        self._latest: StepMetrics | None = None

    def update(self, metrics: StepMetrics) -> None:
        """Say a step, where it is time to."""
        self._pace.advance(metrics.step - self._pace.done)
        if self._latest is None or metrics.step == self._total or self._pace.due:
            left = self._pace.left
            self._say(metrics, f", {duration(left)} left" if left else "")
            self._pace.said()
        self._latest = metrics

    def held_out(self, loss: float) -> None:
        """Nothing: the log has a line of it."""

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
        f"{speed(metrics)}{use}, {metrics.memory:.1f} GiB{skipped}"
    )


def speed(metrics: StepMetrics) -> str:
    """Tokens each second, which of them are learned, and how much of the rows is padding."""
    return f"{metrics.tokens_per_s:,.0f} tokens/s ({metrics.learned_per_s:,.0f} learned, {metrics.padding:.0%} padding)"
