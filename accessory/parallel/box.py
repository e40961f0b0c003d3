"""Rectangular parts of whole tensors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangular part of a whole tensor: its corner and its size along each axis."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        return cls((0,) * len(shape), shape)

    def intersect(self, other: "Box") -> "Box | None":
        """The common part, or None."""
        start, size = [], []
        for a, m, b, n in zip(self.start, self.size, other.start, other.size, strict=True):
            first, end = max(a, b), min(a + m, b + n)
            if end <= first:
                return None  # at once: every expert's box is held against every other's of its layer
            start.append(first)
            size.append(end - first)
        return Box(tuple(start), tuple(size))

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that holds ``outer``."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.start, outer.start, self.size, strict=True))

    def chunk(self, axis: int, *, rank: int, size: int) -> "Box":
        """Piece ``rank`` of ``size`` along an axis, as torch.chunk cuts: the last may be smaller, or empty."""
        piece = -(-self.size[axis] // size)
        skipped = min(rank * piece, self.size[axis])
        start, part = list(self.start), list(self.size)
        start[axis], part[axis] = start[axis] + skipped, min(piece, part[axis] - skipped)
        return Box(tuple(start), tuple(part))

    def turned(self, axes: Sequence[int]) -> "Box":
        """The same part of the tensor with its axes in another order."""
        return Box(tuple(self.start[axis] for axis in axes), tuple(self.size[axis] for axis in axes))

    def pieces(self, most: int) -> Iterator["Box"]:
        """The box in pieces of at most so many elements, in the order in which they lie in memory."""
        axis = next((axis for axis, length in enumerate(self.size) if length > 1), 0)
        count = min(self.size[axis], -(-self.numel // most)) if self.size else 1
        for rank in range(count):
            piece = self.chunk(axis, rank=rank, size=count)
            if piece.numel > most:
                yield from piece.pieces(most)
            elif piece.numel:
                yield piece

    @property
    def numel(self) -> int:
        return math.prod(self.size)
