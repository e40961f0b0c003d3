"""A layout's rows: which tensor of a checkpoint's files holds which part of which parameter, and how it lies there.

A row stands for a kind of tensor; `expand` makes of a layout's rows one `Source` for each tensor that the files of a
model of given sizes have. A source reads and writes alike, so that what can be read is written by the same rows.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from accessory.checkpoint.blocks import Coding, nbytes_of, seen
from accessory.config import ModelArgs
from accessory.parallel.box import Box
from accessory.parallel.plan import Placement, generic_name, local_box, matrix_of, parameter_shapes

Shape = tuple[int, ...]
# A head's width, and how many of its first numbers the rotary embedding turns.
Head = tuple[int, int]
# Elements that are copied at once.
_AT_ONCE = 1 << 22
# Of a row's `part`: a key for each expert, or all of an axis in one tensor.
EACH: Literal["each"] = "each"
ALL: Literal["all"] = "all"


@dataclass(frozen=True)
class Lie:
    """How a tensor lies in a file.

    Attributes:
        stored: from the shape of what it holds to its shape in the file.
        seen: from the file's tensor, the shape of what it holds, and the heads, to something that is indexed as what it
            holds; writing to an index of it writes to the file.
        axes: of what it holds, in the order in which they lie in the file; () where that is their own. None: the file
            has no part of them in one piece.
    """

    stored: Callable[[Shape], Shape]
    seen: Callable[[Any, Shape, Head], Any]
    axes: Shape | None = None


class _Rows:
    """A matrix whose rows lie in another order in its file."""

    def __init__(self, stored: Any, order: Tensor) -> None:
        self._stored, self._order = stored, order

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        # Rows between the outermost, and columns, first: so only heads that are asked for are read, or decoded.
        rows = self._order[index[0]]
        first, last = (rows.min().item(), rows.max().item()) if len(rows) else (0, -1)
        found: Tensor = self._stored[(slice(first, last + 1), *index[1:])][rows - first]
        return found

    def __setitem__(self, index: tuple[slice, ...], values: Tensor) -> None:
        self._stored[(self._order[index[0]], *index[1:])] = values


def _in_halves(stored: Any, shape: Shape, head: Head) -> _Rows:
    """Rotary pairs (0, 1), (2, 3), ... of each head: first all the first of them lie there, then all the second.

    Behind them lies what is not turned.
    """
    width, turned = head
    places = torch.arange(shape[0]).view(-1, width)
    pairs = places[:, :turned].unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    return _Rows(stored, torch.cat((pairs, places[:, turned:]), dim=1).flatten())


class _Transposed:
    """Matrices (experts, rows, columns) of which each lies with its axes exchanged in its file."""

    def __init__(self, stored: Tensor) -> None:
        self._stored = stored

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        experts, rows, columns = index
        # The file's own rows first, then each matrix by itself: PyTorch turns a whole one quickly, and a part slowly.
        return torch.stack([own.contiguous().t().contiguous() for own in self._stored[experts, columns, rows]])

    def __setitem__(self, index: tuple[slice, ...], values: Tensor) -> None:
        experts, rows, columns = index
        for own, matrix in zip(self._stored[experts, columns, rows], values, strict=True):
            own.copy_(matrix.contiguous().t().contiguous())


class _ByTurns:
    """Two matrices (experts, 2, rows, columns) whose rows lie by turns in a file, (experts, 2 * rows, columns)."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        experts, halves, rows, columns = index
        found: Tensor = self._stored[experts, slice(2 * rows.start, 2 * rows.stop), columns]
        return found.unflatten(1, (-1, 2)).transpose(1, 2)[:, halves]


PLAIN = Lie(lambda shape: shape, lambda stored, shape, _: stored, axes=())
# (experts, rows, columns) one expert below the other; the second with each expert's matrix transposed.
STACKED = Lie(lambda shape: (math.prod(shape[:-1]), shape[-1]), lambda stored, shape, _: stored.view(shape), axes=())
STACKED_TRANSPOSED = Lie(
    lambda shape: (shape[0] * shape[2], shape[1]),
    lambda stored, shape, _: _Transposed(stored.view(shape[0], shape[2], shape[1])),
    axes=(0, 2, 1),
)
# (experts, 2, rows, columns), each expert's two matrices one below the other.
FUSED = Lie(
    lambda shape: (shape[0], math.prod(shape[1:-1]), shape[-1]), lambda stored, shape, _: stored.view(shape), axes=()
)
# The same two by turns: their rows; their columns, of matrices that are transposed; and biases' values.
BY_TURNS = Lie(lambda shape: (shape[0], 2 * shape[2], shape[3]), lambda stored, shape, _: _ByTurns(stored))
BY_TURNS_TRANSPOSED = Lie(
    lambda shape: (shape[0], shape[3], 2 * shape[2]),
    lambda stored, shape, _: stored.view(shape[0], shape[3], shape[2], 2).permute(0, 3, 2, 1),
    axes=(0, 3, 2, 1),
)
VALUES_BY_TURNS = Lie(
    lambda shape: (shape[0], 2 * shape[2]),
    lambda stored, shape, _: stored.view(shape[0], shape[2], 2).transpose(1, 2),
    axes=(0, 2, 1),
)
# (experts, rows, columns), each expert's matrix transposed.
TRANSPOSED = Lie(
    lambda shape: (shape[0], shape[2], shape[1]), lambda stored, shape, _: _Transposed(stored), axes=(0, 2, 1)
)
ROTARY_HALVES = Lie(lambda shape: shape, _in_halves)


@dataclass(frozen=True)
class Row:
    """A kind of tensor.

    Attributes:
        parameter: whose part it holds, by its row in the plan's table: ``N`` stands for a layer.
        key: its name in a file; {N} and {E} stand for layer and expert.
        part: what of the parameter's first axes it holds: an index, EACH expert by a key of its own, or ALL.
        lies: how it lies in the file.
        written: False: it is read only, and another row of the parameter is written.
    """

    parameter: str
    key: str
    part: tuple[int | str, ...] = ()
    lies: Lie = PLAIN
    written: bool = True


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint file and the part of a parameter that it holds.

    Attributes:
        parameter: name in the Transformer.
        file: number of the file; None: it lies in whichever has it.
        key: name in the file, without the layout's prefix.
        box: the part of the whole parameter that the tensor holds.
        kept: which axes of the box the tensor has; the others have the length 1.
        factor: what its values are multiplied by when they are read.
    """

    parameter: str
    file: int | None
    key: str
    box: Box
    kept: tuple[int, ...]
    lies: Lie
    head: Head
    written: bool
    factor: float = 1.0

    @cached_property
    def shape(self) -> Shape:
        """The tensor's, in the file."""
        return self.lies.stored(self._held)

    @property
    def _held(self) -> Shape:
        return tuple(self.box.size[axis] for axis in self.kept)

    def read(self, stored: Any, part: Box) -> Tensor:
        """A part of the box, in its shape; of a plain tensor a view where its rows have our order."""
        found: Tensor = self.lies.seen(stored, self._held, self.head)[self._index(part)]
        if self.factor != 1:
            found = found.float() * self.factor
        return found[tuple(slice(None) if axis in self.kept else None for axis in range(len(part.size)))]

    def copy(self, stored: Any, part: Box, target: Tensor) -> None:
        """Write a part of the box into a tensor of its shape, in pieces: what is no view of the file stays small."""
        for piece in part.pieces(_AT_ONCE):
            target[piece.within(part)].copy_(self.read(stored, piece))

    def write(self, stored: Any, part: Box, values: Tensor) -> None:
        """Write a part of the box, which has its shape, into the file's tensor."""
        kept = [values.shape[axis] for axis in self.kept]
        seen = self.lies.seen(stored, self._held, self.head)
        seen[self._index(part)] = values.reshape(kept).to(stored.dtype)

    def pieces(self, most: int) -> Iterator[Box]:
        """The box in parts of at most so many elements, in their order in the file, where each lies in one piece.

        What the file has in no piece is one part, however large.
        """
        if self.lies.axes is None:
            yield self.box
            return
        axes = sorted(range(len(self.box.size)), key=self.kept.__contains__)  # those of length 1 are anywhere
        if self.lies.axes:
            axes[-len(self.kept) :] = [self.kept[axis] for axis in self.lies.axes]
        back = sorted(range(len(axes)), key=axes.__getitem__)
        for piece in self.box.turned(axes).pieces(most):
            yield piece.turned(back)

    def encoded(self, part: Box, values: Tensor, coding: Coding, name: str) -> Tensor:
        """A part of `pieces`, as the file has it: uint8. ``name`` is the tensor's and its file's, for messages."""
        if self.lies.axes == () and isinstance(coding, torch.dtype):
            return values.to(coding).contiguous().view(-1).view(torch.uint8)
        own = dataclasses.replace(self, box=part)
        # What a form has beside the values, as the other halves of fused updates, is zero.
        data = torch.zeros(nbytes_of(own.shape, coding), dtype=torch.uint8)
        own.write(seen(name, data, own.shape, coding), part, values)
        return data

    def _index(self, part: Box) -> tuple[slice, ...]:
        index = part.within(self.box)
        return tuple(index[axis] for axis in self.kept)


def expand(
    rows: Mapping[str, Sequence[Row]], args: ModelArgs, *, cut: Placement | None, files: int = 1
) -> Iterator[Source]:
    """The sources of a model of these sizes.

    Args:
        rows: of `by_parameter`.
        cut: how ``files`` files cut the parameters, as so many ranks do; None: each tensor is whole, in any file.
    """
    head = (args.head_dim, args.rotary_dim)
    for name, shape in parameter_shapes(args):
        matrix, tensor = matrix_of(name)
        own = rows.get(generic_name(matrix), ())
        layer = name.split(".")[1] if own and ".N." in own[0].parameter else ""
        for file in range(files) if cut is not None else (None,):
            if cut is None or file is None:
                box = Box.whole(shape)
            else:
                box = local_box(name, shape, args, placement=cut, rank=file, size=files)
            for row in own:
                yield from _sources(row, name, f".{tensor}" if tensor else "", layer, file, box, head)


def _sources(row: Row, name: str, ending: str, layer: str, file: int | None, box: Box, head: Head) -> Iterator[Source]:
    fixed = [axis for axis, index in enumerate(row.part) if index != ALL]
    kept = tuple(axis for axis in range(len(box.size)) if axis not in fixed)
    for expert in range(box.start[0], box.start[0] + box.size[0]) if EACH in row.part else (0,):
        start, size = list(box.start), list(box.size)
        for axis in fixed:
            index = row.part[axis]
            start[axis], size[axis] = expert if index == EACH else int(index), 1
        key = row.key.format(N=layer, E=expert) + ending
        part = Box(tuple(start), tuple(size))
        yield Source(name, file, key, part, kept, row.lies, head, row.written)


def by_parameter(rows: Iterable[Row]) -> dict[str, tuple[Row, ...]]:
    """Rows as `expand` takes them."""
    found: dict[str, tuple[Row, ...]] = {}
    for row in rows:
        found[row.parameter] = (*found.get(row.parameter, ()), row)
    return found


def for_all(rows: Iterable[Row]) -> Callable[[ModelArgs], Mapping[str, Sequence[Row]]]:
    """Rows as a layout takes them, whatever the model."""
    found = by_parameter(rows)
    return lambda args: found


class Parts:
    """The sources of one parameter. Of many experts only those are looked at that a box may meet."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = sorted(sources, key=lambda source: source.box.start)
        self._starts = [source.box.start[0] for source in self.sources]
        self._longest = max(source.box.size[0] for source in self.sources)

    def within(self, box: Box) -> Iterator[tuple[Source, Box]]:
        """The sources that hold a part of a box, each with that part."""
        first = bisect.bisect_right(self._starts, box.start[0] - self._longest)
        last = bisect.bisect_left(self._starts, box.start[0] + box.size[0])
        for source in self.sources[first:last]:
            if common := box.intersect(source.box):
                yield source, common


def parts_of(sources: Iterable[Source]) -> dict[str, Parts]:
    """Sources by the parameter whose parts they are."""
    found: dict[str, list[Source]] = {}
    for source in sources:
        found.setdefault(source.parameter, []).append(source)
    return {name: Parts(own) for name, own in found.items()}
