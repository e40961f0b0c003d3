"""A folder whose matrices are quantized, and which loads without the originals."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from accessory.checkpoint.folder import Folder, Weights
from accessory.checkpoint.layouts import BASE, Source
from accessory.checkpoint.quantizing import pieces
from accessory.checkpoint.write import Writer, new_checkpoint, shards_like
from accessory.config import ModelArgs, QuantArgs, QuantForm
from accessory.parallel.box import Box
from accessory.parallel.plan import matrix_of, parameter_shapes
from accessory.progress import showing
from accessory.quant import (
    TENSOR_DTYPES,
    InputMoments,
    quantize,
    quantize_calibrated,
    shown_quantized,
)


@dataclass(frozen=True)
class QuantizeReport:
    """What was quantized: into which type, how many matrices, how many weights they have, and their bytes now."""

    type: QuantForm
    matrices: int
    weights: int
    now: int

    def __str__(self) -> str:
        return f"quantized {self.matrices} matrices into {self.type}: {shown_quantized(self.now, self.weights)}"


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
        raise ValueError(f"{folder.path}: {'; '.join(obstacles)}")
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
        calibration: of what the matrices' inputs are like; for int4, whose rounding it then guides.
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
                values, group = piece.read(weights), quant.group_size
                moments = calibration.get((name, piece.leading))
                with piece.named(weights):
                    if moments is None:
                        weight = quantize(values, quant.type, group_size=group)
                    else:
                        weight = quantize_calibrated(values, moments, group_size=group)
                for own, tensor in weight.tensors().items():
                    box = Box((*piece.box.start[:-2], 0, 0), (*piece.box.size[:-2], *tensor.shape))
                    writer.put(f"{name}.{weight.form}_{own}", box, tensor.view(box.size))
                matrices, now = matrices + 1, now + weight.nbytes
                count += math.prod(weight.shape)
    return QuantizeReport(quant.type, matrices, count, now)
