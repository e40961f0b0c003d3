"""A folder whose matrices are quantized, and which loads without the originals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.convert import stored_args, write_beside
from accessory.checkpoint.formats import PREFIX, Source, base_sources, obstacles_to_files
from accessory.checkpoint.manifest import Manifest
from accessory.checkpoint.quantizing import Piece, pieces
from accessory.checkpoint.weights import StoredWeights
from accessory.checkpoint.writer import create_shard
from accessory.config import PEFT_TYPES, ModelArgs, QuantArgs, QuantForm
from accessory.files import new_folder
from accessory.parallel.box import Box
from accessory.parallel.plan import matrix_of, parameter_shapes
from accessory.progress import showing
from accessory.quant import (
    TENSOR_DTYPES,
    InputMoments,
    QuantizedWeight,
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
) -> tuple[Manifest, ModelArgs]:
    """A folder that can be quantized in this way, and its sizes as they are; no weight of it is read.

    Args:
        llama_config: config files for a folder that has none, or to overrule it.

    Raises:
        ValueError: the folder is quantized already, or groups do not divide its sizes.
        CheckpointError, FileNotFoundError, OSError: it cannot be read.
    """
    manifest = Manifest.read(source)
    plain = stored_args(manifest, llama_config)
    if plain.quant is not None:
        raise ValueError(
            f"{manifest.folder} is quantized already ({plain.quant.type}): give the weights it was made of"
        )
    obstacles = obstacles_to_files(plain.replace(quant=quant), 1, sparse=False)
    if obstacles:
        raise ValueError(f"{manifest.folder}: {'; '.join(obstacles)}")
    return manifest, plain


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
    manifest, plain = source_to_quantize(source, quant, llama_config)
    args = plain.replace(quant=quant)
    files = len(manifest.shards)
    files = 1 if obstacles_to_files(args, files, sparse=False) else files
    weights = StoredWeights(manifest, plain)
    targets: dict[str, list[Source]] = {}
    for target in base_sources(args, files):
        matrix, _ = matrix_of(target.parameter)
        if matrix in weights.held:
            targets.setdefault(matrix, []).append(target)
    with new_folder(Path(destination)) as aside:
        shards = []
        for file in range(files):
            own = [target for wanted in targets.values() for target in wanted if target.file == file]
            tensors = {PREFIX + target.key: (target.shape, _dtype(target, weights)) for target in own}
            shards.append(create_shard(aside / f"consolidated.{file:02d}-of-{files:02d}.model.pth", tensors))
        report = _fill(shards, targets, weights, args, calibration or {})
        write_beside(aside, args, PEFT_TYPES[0] if args.peft else "mistral", manifest)
    return report


def _dtype(target: Source, weights: StoredWeights) -> torch.dtype:
    tensor = matrix_of(target.parameter)[1]
    return TENSOR_DTYPES[tensor] if tensor else weights.dtype(target.parameter, target.box)


def _fill(
    shards: list[dict[str, Tensor]],
    targets: dict[str, list[Source]],
    weights: StoredWeights,
    args: ModelArgs,
    calibration: Calibration,
) -> QuantizeReport:
    assert args.quant is not None
    shapes = dict(parameter_shapes(args.replace(quant=None)))
    matrices = count = now = 0
    with showing("quantizing", len(targets), unit="matrices") as quantizing:
        for name, wanted in quantizing.over(targets.items()):
            if not matrix_of(wanted[0].parameter)[1]:
                for target in wanted:
                    target.view(shards[target.file][PREFIX + target.key]).copy_(weights.read(name, target.box))
                continue
            for piece in pieces(name, Box.whole(shapes[name])):
                values, group = piece.read(weights), args.quant.group_size
                moments = calibration.get((name, piece.leading))
                with piece.named(weights):
                    if moments is None:
                        weight = quantize(values, args.quant.type, group_size=group)
                    else:
                        weight = quantize_calibrated(values, moments, group_size=group)
                _write(weight, piece, wanted, shards)
                matrices, now = matrices + 1, now + weight.nbytes
                count += math.prod(weight.shape)
    return QuantizeReport(args.quant.type, matrices, count, now)


def _write(weight: QuantizedWeight, piece: Piece, wanted: list[Source], shards: list[dict[str, Tensor]]) -> None:
    """Copy a matrix's tensors to wherever a file holds some of them."""
    named = {f"{weight.form}_{name}": tensor for name, tensor in weight.tensors().items()}
    for target in wanted:
        tensor = named[matrix_of(target.parameter)[1]]
        whole = Box((*piece.box.start[:-2], 0, 0), (*piece.box.size[:-2], *tensor.shape))
        common = target.box.intersect(whole)
        if common is not None:
            written = target.view(shards[target.file][PREFIX + target.key])[common.within(target.box)]
            written.copy_(tensor.view(whole.size)[common.within(whole)])
