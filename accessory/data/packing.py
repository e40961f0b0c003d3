"""Which examples share a row, and which rows a training step takes.

An example is never cut, and sees nothing of the others in its row. Which share one is settled once for a run, by the
lengths, the room of a row and the seed; the rows come in another order in every epoch.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from accessory.data.sampler import StepSampler

# Examples of the shuffled order that are dealt to rows together: enough that these are nearly full, and few enough
# that who shares a row is left to chance.
_WINDOW = 2048


class PackedSampler(StepSampler):
    """A `StepSampler` of rows that hold several examples: a step is `global_batch` of them, in random order.

    Args:
        lengths: the tokens of the examples, none longer than `room`.
        room: the most tokens of a row.
    """

    def __init__(
        self, lengths: Sequence[int] | NDArray[np.integer], global_batch: int, *, room: int, seed: int = 0
    ) -> None:
        examples = np.asarray(lengths, dtype=np.int64)
        self.room: int = room
        self._rows = pack(examples, room, seed=seed)
        self._examples = examples
        super().__init__([int(examples[row].sum()) for row in self._rows], global_batch, seed=seed)

    def row(self, index: int) -> Sequence[int]:
        return [int(example) for example in self._rows[index]]

    @property
    def filled(self) -> float:
        """Share of the rows' room that examples take."""
        return float(self._examples.sum()) / (len(self._rows) * self.room)

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        return rng.permutation(len(self.lengths))

    @property
    def _digest(self) -> int:
        return zlib.crc32(self._examples.astype("<i8").tobytes())


def pack(lengths: NDArray[np.int64], room: int, *, seed: int = 0) -> list[NDArray[np.int64]]:
    """The examples of each row, at most `room` tokens together.

    Best fit, the longest first, over windows of a random order: each goes to the row that it leaves the least room in.

    Raises:
        ValueError: an example is longer than a row.
    """
    if len(lengths) and lengths.max() > room:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into a row of {room}: give more room")
    order = np.random.default_rng([seed]).permutation(len(lengths))
    rows: list[NDArray[np.int64]] = []
    for begin in range(0, len(order), _WINDOW):
        window = order[begin : begin + _WINDOW]
        opened: list[list[int]] = []
        left: list[tuple[int, int]] = []  # the room of each row and its number, from little to much
        for example in window[np.argsort(-lengths[window], kind="stable")]:
            length = int(lengths[example])
            place = bisect.bisect_left(left, (length, 0))
            if place == len(left):
                opened.append([])
                rest, row = room, len(opened) - 1
            else:
                rest, row = left.pop(place)
            opened[row].append(int(example))
            bisect.insort(left, (rest - length, row))
        rows += [np.array(row, dtype=np.int64) for row in opened]
    return rows
