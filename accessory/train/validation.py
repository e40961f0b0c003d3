"""When a run evaluates its held-out data, and what follows from it: the best model, and an early end."""

import logging
import math
import zlib
from typing import Any

import numpy as np

from accessory.data.finetune_data import FinetuneData
from accessory.evaluation.measure import Measured, measure, name_not_finite
from accessory.model.meta import MetaModel
from accessory.text.tokenizer import Tokenizer
from accessory.train.options import FinetuneOptions
from accessory.train.snapshot import reshard

logger = logging.getLogger(__name__)


class Validation:
    """The evaluations of a run.

    Attributes:
        best: the lowest held-out loss so far; infinite before the first.
        since: evaluations after that one. That of a last step beside the interval is none of them, so that a run in
            parts ends where a whole one does.
        at: the step of the last evaluation; -1 before the first.
    """

    def __init__(self, options: FinetuneOptions, held_out: FinetuneData | None, *, per_epoch: int) -> None:
        self._options, self._held_out = options, held_out
        self._interval = options.eval_interval or per_epoch
        self.best, self.since, self.at = math.inf, 0, -1

    def due(self, done: int, end: int) -> bool:
        """Whether to evaluate after step ``done`` of a run that ends with step ``end``."""
        if self._held_out is None or done == self.at:
            return False
        return done == end or (done % self._interval == 0 if done else self._options.eval_first)

    def evaluate(self, model: MetaModel, done: int) -> tuple[Measured, bool]:
        """Measure the model after step ``done``; whether it is the best so far. Collective over all ranks.

        Rows without a finite loss are named by rank 0's log; such an evaluation is no best one.
        """
        assert self._held_out is not None
        measured = measure(model, self._held_out)
        reshard(model)  # what the passes gathered and "sdp" would keep for a backward pass
        if bad := name_not_finite(measured, self._held_out):
            state = model.llma.state
            say = logger.warning if state.is_first and state.dp_rank == 0 else logger.debug
            say("step %d: %s: training goes on", done, bad)
        better = measured.loss < self.best
        if better:
            self.best, self.since = measured.loss, 0
        elif done % self._interval == 0:
            self.since += 1
        self.at = done
        return measured, better

    @property
    def gives_up(self) -> bool:
        """Whether the loss has not fallen for as many evaluations as --early_stop says."""
        return self._options.early_stop is not None and self.since >= self._options.early_stop

    def state(self) -> dict[str, Any]:
        """What a training state says of it, in JSON's values."""
        best = None if self.best == math.inf else self.best
        return {"best": best, "since": self.since, "at": self.at, "data": self._digest}

    def resume(self, state: dict[str, Any] | None) -> bool:
        """Go on from a `state` (None: of a run that could not evaluate); whether its losses are of the same data.

        Else they say nothing of the next ones, and best loss and patience begin anew.
        """
        if state is None or state["data"] != self._digest:
            return state is None or state["data"] is None
        self.best = math.inf if state["best"] is None else state["best"]
        self.since, self.at = state["since"], state["at"]
        return True

    @property
    def _digest(self) -> int | None:
        """Of the held-out records, in whatever order; None without any."""
        return None if self._held_out is None else zlib.crc32(np.sort(self._held_out.digests).tobytes())


def split_held_out(
    data: FinetuneData, other: FinetuneData | None, options: FinetuneOptions, tokenizer: Tokenizer
) -> tuple[FinetuneData, FinetuneData | None]:
    """The examples to learn from, and those that are held out, of which no record is among the others.

    Args:
        other: the examples of --eval_data_config.

    Raises:
        ValueError: naming the option: nothing is left on one side, a record is on both, or the two ask in other forms.
    """
    if options.eval_ratio is not None:
        learned, held_out = data.held_back(options.eval_ratio)
        if not len(held_out) or not len(learned):
            found, remedy = ("none", "larger") if not len(held_out) else ("all", "smaller")
            what = f"--eval_ratio {options.eval_ratio} holds back {found} of {len(data):,} examples"
            raise ValueError(f"{what}: give a {remedy} one, or --eval_data_config YAML")
        return learned, held_out
    if other is None:
        return data, None
    forms = [form["name"] for form in (other.prompt_form, data.prompt_form) if form is not None]
    if len(set(forms)) > 1:
        raise ValueError(
            f"the records of --eval_data_config have the prompt form {forms[0]}, and those of --data_config "
            f"{forms[1]}: name one for all with --chat_template"
        )
    shared = other.digests_in(data)
    if len(shared):
        begin = tokenizer.decode(other[int(shared[0])][0][:24].tolist())
        raise ValueError(
            f"--eval_data_config {options.eval_data_config}: {len(shared):,} of its {len(other):,} examples are of "
            f"records that --data_config trains on, first {other.place(int(shared[0]))} ({begin!r}...): take them out "
            "of one of the two"
        )
    return data, other
