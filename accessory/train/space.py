"""How much a run is going to write, said before its first step."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from accessory.errors import shown_bytes
from accessory.model.meta import MetaModel
from accessory.train.export import BEST
from accessory.train.optim import kept_bytes
from accessory.train.options import FinetuneOptions
from accessory.train.snapshot import frozen_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """Folders of one kind that a run writes one after another, and of which the newest stay.

    Attributes:
        new: how many are still to be written.
        there: how many lie there already.
        keep: how many stay; None: all.
        size: bytes of each.
    """

    new: int
    there: int
    keep: int | None
    size: int

    @property
    def bytes(self) -> int:
        """What they take beyond what is there: while one is written, those that stay are there beside it."""
        at_once = self.new + self.there if self.keep is None else min(self.new + self.there, self.keep + 1)
        return self.size * max(0, at_once - self.there)

    @property
    def staying(self) -> str:
        return "" if self.keep is None or self.new + self.there <= self.keep else f" ({self.keep} stay)"


@dataclass(frozen=True)
class Plan:
    """What a run writes from here to its end."""

    epochs: Kind
    within: Kind
    states: Kind
    best: Kind = Kind(0, 0, 1, 0)

    @classmethod
    def of(
        cls,
        options: FinetuneOptions,
        model: MetaModel,
        output: Path,
        *,
        done: int,
        end: int,
        per_epoch: int,
        itemsize: int,
    ) -> "Plan":
        """The plan of a run that has taken ``done`` steps and ends at ``end``.

        Args:
            model: its parameters are the whole model's, however they are sharded.
            itemsize: bytes of a number in the exported models.
        """
        exported = saved = 0
        frozen = frozen_of(model)
        quantized = any("_codes" in name for name, _ in model.named_parameters())
        for name, parameter in model.named_parameters():
            trains, own = parameter.requires_grad, name not in frozen
            if own or not (options.only_save_trainable or quantized):
                exported += parameter.numel() * itemsize
            if own or not options.only_save_trainable:
                saved += parameter.numel() * parameter.element_size()
            saved += int(parameter.numel() * kept_bytes(options.optimizer, name, parameter.shape)) if trains else 0
        at_ends, within = models_after(options, done=done, end=end, per_epoch=per_epoch)
        names = [path.parent.name for path in output.glob("epoch*/meta.json")]
        inner = sum("-" in name for name in names)
        states = len(list(options.checkpoints.glob("step-*/state.json")))
        return cls(
            Kind(at_ends, len(names) - inner, options.keep_models, exported),
            Kind(within, inner, options.keep_last, exported),
            Kind(at_ends + within, states, options.keep_last, saved),
            Kind(int(options.keep_best), int((output / BEST / "meta.json").exists()), 1, exported),
        )

    @property
    def bytes(self) -> int:
        return self.epochs.bytes + self.within.bytes + self.states.bytes + self.best.bytes

    def describe(self, output: Path) -> str:
        """One line, which ends with the space that all of it takes at most."""
        every = " (all stay; --keep_models N keeps the last N)"
        all_stay = self.epochs.keep is None and self.epochs.new > 1
        models = [
            f"{kind.new:,} {where}{every if all_stay and kind is self.epochs else kind.staying}"
            for kind, where in ((self.epochs, "at epochs' ends"), (self.within, "within epochs"), (self.best, "best"))
            if kind.new
        ]
        return (
            f"models to write in {output}: {', '.join(models) or 'none'}, {shown_bytes(self.epochs.size)} each; "
            f"training states in its checkpoints: {self.states.new:,}{self.states.staying}, "
            f"{shown_bytes(self.states.size)} each; together {shown_bytes(self.bytes)} at most"
        )


def models_after(options: FinetuneOptions, *, done: int, end: int, per_epoch: int) -> tuple[int, int]:
    """How many models are written after step ``done``: at epochs' ends, and within epochs."""

    def at_ends(step: int) -> int:
        return step // per_epoch // options.save_interval

    interval = options.save_iteration_interval
    every = max(1, interval // options.accum_iter) if interval else 0

    def within(step: int) -> int:
        """Those whose step is no epoch's end, and those at ends that --save_interval passes over."""
        if not every:
            return 0
        epochs, rest = divmod(step, per_epoch)
        passed_over = epochs - at_ends(step) if per_epoch % every == 0 else 0
        return epochs * ((per_epoch - 1) // every) + rest // every + passed_over

    ends, inner = at_ends(end) - at_ends(done), within(end) - within(done)
    if end > done:  # the last step is always saved
        epochs, rest = divmod(end, per_epoch)
        if rest:
            inner += not (every and rest % every == 0)
        elif epochs % options.save_interval:
            ends += 1
            inner -= bool(every) and per_epoch % every == 0
    return ends, inner


def say_space(plan: Plan, output: Path) -> None:
    """Log what will be written, as a warning where there is no room for it."""
    try:
        free = shutil.disk_usage(output).free
    except OSError:  # some file systems do not tell
        logger.info("%s", plan.describe(output))
        return
    text = f"{plan.describe(output)}, and {shown_bytes(free)} are free"
    if plan.bytes > free:
        remedy = ": free some, or give --keep_models N, --keep_last 1 or another --output_dir"
        logger.warning("%s", text + remedy)
    else:
        logger.info("%s", text)
