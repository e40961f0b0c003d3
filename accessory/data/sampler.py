"""Which rows a training step takes, and which of them each rank sees.

A row is an example, or several that share it (packing.py). An epoch is cut into steps of `global_batch` rows, the
product of batch size, data-parallel ranks and accumulation; only this product and the seed decide which rows a step
holds. So a run can go on with other ranks or another accumulation and see the same data.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# How far, as a share of its length, an example may move among its neighbours from one epoch to the next:
# enough that it meets others, little enough that a step's rows need hardly any padding.
_JITTER = 0.05


class StepSampler:
    """The steps of every epoch, a pure function of `lengths`, `global_batch`, `seed` and the epoch.

    `lengths` are the tokens of the rows, each an example, `global_batch` the rows of a step. Rows of similar length
    share a step; the steps come in random order. One step of an epoch is smaller if the rows do not divide.
    Raises ValueError where there is no row or `global_batch` is not positive.
    """

    room: int | None = None
    """The most tokens of a row that several examples share; None: none is shared."""

    def __init__(self, lengths: Sequence[int] | NDArray[np.integer], global_batch: int, *, seed: int = 0) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.ndim != 1 or not len(self.lengths):
            raise ValueError("there is no example to train on")
        if global_batch < 1:
            raise ValueError(f"batch size x data-parallel ranks x accumulation is {global_batch}: make it positive")
        self.global_batch = int(global_batch)
        self.seed = int(seed)

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps of an epoch."""
        return -(-len(self.lengths) // self.global_batch)

    def row(self, index: int) -> Sequence[int]:
        """The examples of a row."""
        return [index]

    def steps(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each step of `epoch` (0 or more), each row in one step, from long to short."""
        rng = np.random.default_rng([self.seed, epoch])
        count, order = len(self.lengths), self._order(rng)
        # The smaller step takes a random place, so that it is not always the longest examples that it holds.
        sizes = np.full(self.steps_per_epoch, self.global_batch)
        sizes[rng.integers(len(sizes))] -= len(sizes) * self.global_batch - count
        steps = np.split(order, np.cumsum(sizes)[:-1])
        return [self._longest_first(steps[index]) for index in rng.permutation(len(steps))]

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """All rows, so that those that are to share a step are neighbours."""
        count = len(self.lengths)
        moved = self.lengths * (1 + _JITTER * rng.random(count))
        return np.lexsort((rng.random(count), moved))  # equal lengths in random order

    def micro_batches(self, step: NDArray[np.int64], *, dp_rank: int, dp_size: int, accum: int) -> list[list[int]]:
        """The micro-batches of rank `dp_rank` in a step that `steps` gave: lists of rows, from long to short.

        Each is at most global_batch / (dp_size * accum) rows. Every rank has the same number of them: `accum`,
        or fewer in a smaller step; one that finds no row for a rank is an empty list, which `collate` turns
        into a row of padding. Which rows all ranks' micro-batches at one place hold together depends on
        `accum`, not on `dp_size`; a rank's share of them is as long as any other's, in rows (to one) and in
        tokens (nearly).

        Raises ValueError for a rank out of range and where dp_size * accum does not divide global_batch.
        """
        if dp_size < 1 or accum < 1 or self.global_batch % (dp_size * accum):
            raise ValueError(
                f"a step of {self.global_batch} examples does not divide by {dp_size} data-parallel ranks x "
                f"accumulation {accum}: change the batch size, the ranks or the accumulation"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} is not one of 0 to {dp_size - 1}")
        ordered = self._longest_first(step)
        width = self.global_batch // accum
        return [_dealt(ordered[begin : begin + width], dp_rank, dp_size) for begin in range(0, len(ordered), width)]

    def state(self, epoch: int, step: int) -> dict[str, int | None]:
        """What `resume` needs to go on at `step` of `epoch`, the next one to be taken."""
        return {
            "epoch": epoch,
            "step": step,
            "global_batch": self.global_batch,
            "seed": self.seed,
            "examples": len(self.lengths),
            "room": self.room,
            "lengths": self._digest,
        }

    def resume(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """The epoch and the step of `state`.

        Raises ValueError where it was saved with another global_batch or seed, or with examples of another number,
        other lengths or in another order: the steps before it would then not be those that were taken, and examples
        would be repeated or dropped.
        """
        if (room := state.get("room")) != self.room:
            packed, now = (
                "each example in a row of its own" if one is None else f"examples packed into rows of {one} tokens"
                for one in (room, self.room)
            )
            raise ValueError(
                f"the checkpoint was trained on {packed}, and now it is {now}: give its --packing and --max_words"
            )
        saved = int(state["global_batch"])
        if saved != self.global_batch:
            raise ValueError(
                f"the checkpoint was saved in an epoch of steps of {saved} examples, and batch_size x data-parallel "
                f"ranks x accum_iter is {self.global_batch} now, which would repeat or drop examples: "
                f"choose the three so that their product is {saved}"
            )
        if int(state["seed"]) != self.seed:
            raise ValueError(f"the checkpoint's data order has seed {state['seed']}, not {self.seed}: keep --seed")
        if int(state["examples"]) != len(self.lengths):
            raise ValueError(
                f"the checkpoint was trained on {state['examples']} examples, and the data hold {len(self.lengths)} "
                "now: give the same data, --max_words, --eval_ratio and --chat_template"
            )
        if state.get("lengths", self._digest) != self._digest:  # older checkpoints do not say
            raise ValueError(
                f"the checkpoint was trained on as many examples ({len(self.lengths)}), but of other lengths or in "
                "another order: give the same data, --max_words, --eval_ratio and --chat_template"
            )
        epoch, step = int(state["epoch"]), int(state["step"])
        # A checkpoint after the last step of an epoch stands at the begin of the next one.
        return (epoch + 1, 0) if step >= self.steps_per_epoch else (epoch, step)

    @property
    def _digest(self) -> int:
        """Of all that the partition into steps depends on beside its seed."""
        return zlib.crc32(self.lengths.astype("<i8").tobytes())

    def _longest_first(self, step: NDArray[np.int64]) -> NDArray[np.int64]:
        return step[np.lexsort((step, -self.lengths[step]))]


def _dealt(examples: NDArray[np.int64], rank: int, size: int) -> list[int]:
    """The share of `rank`: dealt forth and back (0 1 2 2 1 0 0 1 2 ...), so that no rank always gets the longer."""
    turns, seats = np.divmod(np.arange(len(examples)), size)
    return [int(index) for index in examples[np.where(turns % 2, size - 1 - seats, seats) == rank]]
