"""Quantizing plain matrices, one of one expert after another: into a rank's weights while it reads them, or a folder.

So the plain values of a model are never there at once. In int8 a whole row shares a scale; where its inputs are split
over the ranks, they first measure their parts of the rows, then take the maxima of all, and only then quantize.

Shape letters: R outputs, D inputs of this rank's slice of a matrix.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.checkpoint.folder import Folder, Weights
from accessory.checkpoint.layouts import BASE, Source
from accessory.checkpoint.write import Writer, new_checkpoint, shards_like
from accessory.config import ModelArgs, QuantArgs, QuantForm
from accessory.errors import CheckpointError, first_of
from accessory.parallel.box import Box
from accessory.parallel.placement import OTHER_GROUPS
from accessory.parallel.plan import matrix_of, parameter_shapes
from accessory.progress import showing
from accessory.quant import (
    TENSOR_DTYPES,
    Format,
    InputMoments,
    QuantizedWeight,
    format_of,
    quantize_calibrated,
    row_maximum,
    shown_quantized,
    weight_of,
)


class Piece(NamedTuple):
    """One matrix (R, D) of a stacked parameter, or an unstacked one.

    Attributes:
        matrix: the parameter's name.
        leading: its place along the leading axes of this rank's part.
        box: its place in the whole parameter.
    """

    matrix: str
    leading: tuple[int, ...]
    box: Box

    def of(self, weight: QuantizedWeight) -> QuantizedWeight:
        """This piece of the rank's weight, in the same memory."""
        for place in self.leading:
            weight = weight[place]
        return weight

    def read(self, weights: Weights) -> Tensor:
        """Its plain values (R, D)."""
        values: Tensor = weights.read(self.matrix, self.box).view(self.box.size[-2:])
        return values

    def quantize(self, weights: Weights, into: QuantizedWeight, row_max: Tensor | None = None) -> None:
        """Fill a weight (R, D) with it, rounded; what the folder holds in such a format stays what it is.

        Raises:
            CheckpointError: infinities or NaN in it, by name.
        """
        with self.named(weights):
            kept = weights.read_scaled(self.matrix, self.box) if into.codes.dtype == torch.float8_e4m3fn else None
            if kept is None or not into.keep(*(part.view(into.shape).to(into.device) for part in kept)):
                into.write(self.read(weights).to(into.device), row_max=row_max)

    @contextmanager
    def named(self, weights: Weights) -> Iterator[None]:
        """What is wrong with the values is said with folder, matrix and the piece's place in it."""
        try:
            yield
        except ValueError as error:
            place = self.box.start[: len(self.leading)]
            where = f"{self.matrix}, {place}" if place else self.matrix
            raise CheckpointError(f"{weights.folder.path}: {where}: {error}") from None


# A folder, by its number, and a matrix that it holds.
RowsOf = tuple[int, Piece]


def matrix_boxes(boxes: Mapping[str, Box], args: ModelArgs) -> dict[str, Box]:
    """The part of each quantized matrix that the boxes of its tensors stand for, by the matrix's name."""
    assert args.quant is not None
    codes, shared = f"{args.quant.type}_codes", _format(args.quant).tensors["codes"].inputs
    found = {}
    for name, box in boxes.items():
        matrix, tensor = matrix_of(name)
        if tensor == codes and box.numel:
            start, size = (*box.start[:-1], box.start[-1] * shared), (*box.size[:-1], box.size[-1] * shared)
            found[matrix] = Box(start, size)
    return found


def pieces(matrix: str, box: Box) -> Iterator[Piece]:
    """All matrices (R, D) of a rank's part of a parameter."""
    leading = len(box.size) - 2
    for index in itertools.product(*map(range, box.size[:leading])):
        start = tuple(at + place for at, place in zip(box.start, index, strict=False))
        yield Piece(matrix, index, Box((*start, *box.start[leading:]), (*(1,) * leading, *box.size[leading:])))


def measure_rows(boxes: Mapping[str, Box], folders: Sequence[Folder], args: ModelArgs) -> dict[RowsOf, Tensor]:
    """The largest magnitude in this rank's part of every row that it shares with others, (R,) float32; of a format with
    scales for whole rows alone.

    Maxima over the model-parallel ranks, entry by entry, are what `quantize_folder` needs; keys and their order are
    the same on all of them.
    """
    if args.quant is None or not _format(args.quant).whole_rows:
        return {}
    inputs = {name: shape[-1] for name, shape in parameter_shapes(args.replace(quant=None))}
    shared = {name: box for name, box in matrix_boxes(boxes, args).items() if box.size[-1] < inputs[name]}
    found: dict[RowsOf, Tensor] = {}
    for number, folder in enumerate(folders if shared else ()):
        if folder.load_quant() is not None:
            continue
        weights = folder.weights(args, partial=len(folders) > 1)
        for piece in (piece for name, box in shared.items() for piece in pieces(name, box)):
            if weights.holds(piece.matrix, piece.box):
                found[number, piece] = row_maximum(piece.read(weights)).flatten()
    return found


def quantize_folder(
    parameters: Mapping[str, Tensor],
    boxes: Mapping[str, Box],
    weights: Weights,
    args: ModelArgs,
    *,
    number: int = 0,
    row_maxima: Mapping[RowsOf, Tensor] | None = None,
    show_progress: bool = False,
) -> dict[str, int]:
    """Quantize what a plain folder holds of a rank's quantized matrices into their parameters.

    Args:
        number: the folder's, in `measure_rows`.

    Returns:
        How many elements of each parameter were filled.

    Raises:
        CheckpointError: infinities or NaN in a matrix, by name.
    """
    filled: dict[str, int] = {}
    matrices = matrix_boxes(boxes, args)
    assert args.quant is not None
    form = _format(args.quant)
    with showing("quantizing", len(matrices), unit="matrices", shown=show_progress) as quantizing:
        for matrix, box in quantizing.over(matrices.items()):
            tensors = {
                name: parameters[f"{matrix}.{name}"] for name in (f"{args.quant.type}_{own}" for own in form.tensors)
            }
            whole = weight_of(form, tensors)
            for piece in pieces(matrix, box):
                if not weights.holds(matrix, piece.box):
                    continue
                piece.quantize(weights, piece.of(whole), (row_maxima or {}).get((number, piece)))
                share = math.prod(box.size[:-2])
                for tensor, parameter in tensors.items():
                    name = f"{matrix}.{tensor}"
                    filled[name] = filled.get(name, 0) + parameter.numel() // share
    return filled


@dataclass(frozen=True)
class QuantizeReport:
    """What was quantized: into which type, how many matrices, how many weights they have, and their bytes now."""

    type: QuantForm
    matrices: int
    weights: int
    now: int

    def __str__(self) -> str:
        return f"quantized {self.matrices} matrices into {self.type}: {shown_quantized(self.now, self.weights)}"


def _format(quant: QuantArgs) -> Format:
    return format_of(quant.type, quant.group_size)


# Of the matrices (R, D) of a model, by parameter and place along its leading axes.
Calibration = Mapping[tuple[str, tuple[int, ...]], InputMoments]


def source_to_quantize(
    source: str | Path, quant: QuantArgs, llama_config: Sequence[str | Path] | None = None
) -> tuple[Folder, ModelArgs]:
    """A folder that can be quantized in this way, and its sizes as they are; no weight of it is read.

    Args:
        llama_config: config files for a folder that has none, or to overrule it.

    Raises:
        ValueError: the folder is quantized already, or groups do not divide its sizes.
        CheckpointError, FileNotFoundError, OSError: it cannot be read.
    """
    folder = Folder(source)
    plain = folder.stored_args(llama_config)
    if plain.quant is not None:
        raise ValueError(f"{folder.path} is quantized already ({plain.quant.type}): give the weights it was made of")
    obstacles = BASE.obstacles(plain.replace(quant=quant), 1)
    if obstacles:
        raise ValueError(f"{folder.path}: {first_of(obstacles, 1)}: {OTHER_GROUPS}")
    return folder, plain


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    quant: QuantArgs,
    calibration: Calibration | None = None,
    *,
    llama_config: Sequence[str | Path] | None = None,
) -> QuantizeReport:
    """Write ``source`` with its matrices quantized, in as many shards as it has (or one, where groups forbid that).

    On CPU, one matrix of one expert after another: beside the mapped files it takes memory for a few of them.

    Args:
        calibration: of what the matrices' inputs are like; for a format that can be `Format.calibrated`.
        llama_config: config files for a source that has none, or to overrule it.

    Raises:
        ValueError: the folder is quantized already, or groups do not divide its sizes.
        FileExistsError: the destination is not empty.
        CheckpointError, FileNotFoundError, OSError: the source cannot be read, or a matrix of it has infinities or
            NaN; the disk is full.
    """
    folder, plain = source_to_quantize(source, quant, llama_config)
    args = plain.replace(quant=quant)
    weights = folder.weights(plain)
    files = shards_like(weights, BASE, args)
    # What a matrix becomes, by its name.
    tensors: dict[str, list[str]] = {}
    for name, _ in parameter_shapes(args):
        matrix, _ = matrix_of(name)
        if matrix in weights.held:
            tensors.setdefault(matrix, []).append(name)
    held = [name for names in tensors.values() for name in names]
    dtype = functools.partial(_dtype, weights)
    with new_checkpoint(destination, BASE, args, folder, held=held, dtype=dtype, files=files) as writer:
        every = range(len(writer.names))
        writer.open(every)
        report = _fill(writer, tensors, weights, quant, calibration or {})
        writer.close(every)
    return report


def _dtype(weights: Weights, target: Source) -> torch.dtype:
    tensor = matrix_of(target.parameter)[1]
    return TENSOR_DTYPES[tensor] if tensor else weights.dtype_of(target)


def _fill(
    writer: Writer,
    tensors: Mapping[str, Sequence[str]],
    weights: Weights,
    quant: QuantArgs,
    calibration: Calibration,
) -> QuantizeReport:
    shapes = dict(parameter_shapes(weights.args))
    matrices = count = now = 0
    with showing("quantizing", len(tensors), unit="matrices") as quantizing:
        for name, becomes in quantizing.over(tensors.items()):
            if becomes == [name]:
                for box in writer.boxes(name):
                    writer.put(name, box, weights.read(name, box))
                continue
            for piece in pieces(name, Box.whole(shapes[name])):
                moments = calibration.get((name, piece.leading))
                if moments is None:
                    weight = QuantizedWeight.empty(piece.box.size[-2:], quant.type, group_size=quant.group_size)
                    piece.quantize(weights, weight)
                else:
                    with piece.named(weights):
                        weight = quantize_calibrated(piece.read(weights), moments, _format(quant))
                for own, tensor in weight.tensors().items():
                    box = Box((*piece.box.start[:-2], 0, 0), (*piece.box.size[:-2], *tensor.shape))
                    writer.put(f"{name}.{quant.type}_{own}", box, tensor.view(box.size))
                matrices, now = matrices + 1, now + weight.nbytes
                count += math.prod(weight.shape)
    return QuantizeReport(quant.type, matrices, count, now)
