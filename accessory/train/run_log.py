"""The record of a finetuning run, written step by step beside its checkpoints.

In output_dir: log.jsonl, one line for each optimizer step and one for each evaluation; experts.png, how the experts
shared the tokens of late. The same goes to the trackers that were asked for.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from accessory.errors import first_line
from accessory.files import free_name, replacing
from accessory.train.appended_file import AppendedFile
from accessory.train.heatmap import draw
from accessory.train.metrics import StepMetrics, expert_shares, heaviest, lightest
from accessory.train.progress import ProgressBar, ProgressLines
from accessory.train.trackers import Tracker, open_tracker

logger = logging.getLogger(__name__)

LINES, PICTURE = "log.jsonl", "experts.png"


class RunLog:
    """What rank 0 writes about each step; on the other ranks it does nothing.

    Nothing that goes wrong here ends a run: it is said once, and training goes on.

    Args:
        output_dir: folder of the run.
        total_steps: the step with which the run ends.
        first_step: steps taken before; what the folder says of later ones, which will be taken again, is dropped.
        active: whether this is the rank that writes.
        heatmap_every: steps between two pictures of the experts.
        log_to: names of trackers (`trackers.TRACKERS`).
        settings: the run's options, for them to show.

    Raises:
        ValueError: heatmap_every is not positive.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        total_steps: int,
        first_step: int,
        active: bool,
        heatmap_every: int = 50,
        log_to: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if heatmap_every < 1:
            raise ValueError(f"heatmap_every is {heatmap_every}: give 1 or more")
        self._folder, self._heatmap_every = Path(output_dir), heatmap_every
        self._open = active
        self._said: set[tuple[type, int | None]] = set()
        self._trackers: dict[str, Tracker] = {}
        # Pairs of token and expert since the last picture, and the steps that they are of.
        self._pairs_LE: Tensor | None = None
        self._steps = range(first_step + 1, first_step + 1)
        if not active:
            return
        self._lines = StepLines(self._folder / LINES, first_step=first_step)
        for name in dict.fromkeys(log_to):
            with self._forgiving(name):
                folder = self._folder.absolute()
                self._trackers[name] = open_tracker(name, folder, first_step=first_step, settings=settings or {})
        progress = ProgressBar if sys.stderr.isatty() else ProgressLines
        self._progress = progress(total_steps=total_steps, first_step=first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def step(self, metrics: StepMetrics) -> None:
        """Write down a step."""
        if not self._open:
            return
        with self._forgiving():
            self._lines.add(metrics.to_record())
        self._tell(lambda tracker: tracker.add(metrics.step, _scalars(metrics)))
        with self._forgiving():
            self._progress.update(metrics)
        pairs_LE = metrics.pairs_LE.detach().double().cpu()
        self._pairs_LE = pairs_LE if self._pairs_LE is None else self._pairs_LE + pairs_LE
        self._steps = range(self._steps.start, metrics.step + 1)
        if metrics.step % self._heatmap_every == 0:
            self._draw()

    def evaluation(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        """Write down what was measured of held-out data after a step: each number under its name behind "eval_"."""
        if not self._open:
            return
        numbers = {f"eval_{name}": value for name, value in numbers.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        with self._forgiving():
            self._lines.add({"step": step, "epoch": epoch, **dict.fromkeys(numbers), **finite})
        self._tell(lambda tracker: tracker.add(step, finite))
        with self._forgiving():
            self._progress.held_out(numbers["eval_loss"])
            logger.info(
                "step %d: held-out loss %.4f, perplexity %.4g, token accuracy %.2f %%, balance %.3f, of %d tokens",
                *(step, numbers["eval_loss"], numbers["eval_perplexity"], 100 * numbers["eval_token_accuracy"]),
                *(numbers["eval_balance_loss"], numbers["eval_tokens"]),
            )

    def close(self) -> None:
        """Draw what has not been drawn, and close the files; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        self._draw()
        for part in (self._progress, self._lines):
            with self._forgiving():
                part.close()
        self._tell(lambda tracker: tracker.close())

    def _draw(self) -> None:
        """The picture of the steps since the last one, as a file and for the trackers."""
        if self._pairs_LE is None:
            return
        first, last = self._steps.start, self._steps.stop - 1
        with self._forgiving():
            steps = f"step {last}" if first == last else f"steps {first} to {last}"
            png = draw(expert_shares(self._pairs_LE), title=f"Tokens of each expert, {steps}")
            with self._forgiving(), replacing(self._folder / PICTURE) as aside:
                aside.write_bytes(png)
            self._tell(lambda tracker: tracker.add_picture(last, "experts", png))
        self._pairs_LE, self._steps = None, range(last + 1, last + 1)

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            with self._forgiving(name):
                call(tracker)

    @contextlib.contextmanager
    def _forgiving(self, name: str | None = None) -> Iterator[None]:
        """Go on where writing fails, and say so; a full disk fails many times and is said once.

        Args:
            name: the tracker that is called, which is given up unless it is a patient one.
        """
        try:
            yield
        except Exception as error:  # what trackers and matplotlib raise where they do not work is their choice
            what = f"{type(error).__name__}: {first_line(str(error), otherwise='')}"
            kind = (type(error), getattr(error, "errno", None))
            if name in self._trackers and not self._trackers[name].patient:
                del self._trackers[name]
                logger.warning("--log_to %s failed (%s): training goes on without it", name, what)
            elif name is not None and name not in self._trackers:
                logger.warning("--log_to %s cannot begin (%s): training goes on without it", name, what)
            elif kind not in self._said:
                self._said.add(kind)
                logger.warning("writing the run's log in %s failed (%s): training goes on", self._folder, what)


class StepLines:
    """log.jsonl: a JSON object on a line for each step, in order.

    Args:
        first_step: steps taken before; only their lines stay.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path, self._first_step = path, first_step
        self._file = AppendedFile(path)
        self._continued = False

    def add(self, record: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            OSError: the file cannot be written now; the line still waits.
        """
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        if not self._continued:
            self._drop_later(_key_of(record))
            self._continued = True
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _drop_later(self, next_key: tuple[int, bool] | None) -> None:
        """Take out what is taken again, and lines that a crash cut off; a whole earlier log is put aside.

        Args:
            next_key: of the line to come: the evaluation behind the last step may be taken again as well.
        """
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        if self._first_step == 0 and content.strip():
            aside = free_name(self._path)
            with replacing(aside) as unfinished:
                unfinished.write_bytes(content)
            logger.warning("%s held the steps of an earlier run: they are in %s now", self._path, aside.name)
        # One line of each kind for a step; a run from the begin keeps none, that of step 0 neither.
        kept = {
            key: line
            for line in content.split(b"\n")
            if (key := _step_of(line)) not in (None, next_key) and key[0] <= self._first_step > 0
        }
        lines = b"".join(line + b"\n" for line in kept.values())
        if lines != content:
            with replacing(self._path) as aside:
                aside.write_bytes(lines)


def _step_of(line: bytes) -> tuple[int, bool] | None:
    """The step of a line, and whether it is of an evaluation; None where it is no whole record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return _key_of(record) if isinstance(record, dict) else None


def _key_of(record: dict[str, Any]) -> tuple[int, bool] | None:
    step = record.get("step")
    return (step, "eval_loss" in record) if isinstance(step, int) else None


def _scalars(metrics: StepMetrics) -> dict[str, float]:
    """The finite numbers of a step by the trackers' tags, with the extreme shares of every layer."""
    values = metrics.scalars()
    shares_LE = metrics.shares()
    for tag, extremes in (("expert_share_max", heaviest(shares_LE)), ("expert_share_min", lightest(shares_LE))):
        values |= {f"{tag}/layer_{layer:02d}": share for layer, (_, share) in enumerate(extremes)}
    return {tag: value for tag, value in values.items() if math.isfinite(value)}
