"""Filling a rank's parameters from checkpoint folders: only the slices that it owns are read."""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from accessory.checkpoint.folder import Folder, some
from accessory.checkpoint.quantize import RowsOf, quantize_folder
from accessory.config import ModelArgs
from accessory.errors import CheckpointError
from accessory.parallel.box import Box
from accessory.parallel.plan import is_adapter, other_factor
from accessory.parallel.state import ParallelState

logger = logging.getLogger(__name__)


def load_parameters(
    parameters: Mapping[str, Tensor],
    boxes: Mapping[str, Box],
    folders: Sequence[Folder],
    args: ModelArgs,
    state: ParallelState,
    row_maxima: Mapping[RowsOf, Tensor] | None = None,
) -> list[str]:
    """Fill a rank's parameters from checkpoint folders; later folders overlay earlier ones.

    Where ``args.quant`` asks for it, matrices of plain folders are quantized on the way.

    Args:
        parameters: local tensors by name, filled in place (converted to their dtype and device).
        boxes: the part of each whole parameter that the local tensor holds; may be empty.
        row_maxima: those of `measure_rows`, of all ranks.

    Returns:
        Names of the adapters that no folder holds: they are to begin untrained. The same on every rank.

    Raises:
        CheckpointError: a file or tensor that does not fit, or a parameter that no folder fills.
    """
    filled: dict[str, int] = dict.fromkeys(boxes, 0)
    adapters = {name for name in boxes if is_adapter(name)}
    absent = set(adapters)
    for number, folder in enumerate(folders):
        # Ranks start at different files, so that whole copies of a tensor come from a file a rank opens anyway.
        first = state.mp_rank * len(folder.files) // state.mp_size
        partial = len(folders) > 1
        weights = folder.weights(args, partial=partial, probe=first)
        if partial or adapters:
            weights.check_pieces()
        here = dict(boxes)
        if adapters:
            held = weights.held
            again = (adapters & held) - absent
            if state.is_first and state.dp_rank == 0:
                _say_replaced(folder, [name for name in boxes if name in again])
            absent -= held
            here = {name: box for name, box in boxes.items() if name in held or name not in adapters}
        copied = {name: weights.copy(name, box, parameters[name]) for name, box in here.items()}
        if args.quant is not None and weights.args.quant is None:
            copied |= quantize_folder(
                parameters,
                boxes,
                weights,
                args,
                number=number,
                row_maxima=row_maxima,
                show_progress=state.is_first,
            )
        filled = {name: max(count, copied.get(name, 0)) for name, count in filled.items()}
    short = [name for name, count in filled.items() if count < boxes[name].numel and name not in absent]
    if short:
        paths = ", ".join(str(folder.path) for folder in folders)
        raise CheckpointError(f"{paths}: nothing there fills {some(short)}")
    return [name for name in boxes if name in absent]


def _say_replaced(folder: Folder, names: Sequence[str]) -> None:
    """Say that adapters of earlier folders are lost behind a later one: one might expect them to add up."""
    if names:
        # Biases alone are no surprise: those of a merged base go on training and come back.
        level = logging.WARNING if any(other_factor(name) for name in names) else logging.INFO
        logger.log(
            level,
            "%s: %d adapter parameters there (%s, ...) replace those of earlier folders, adapters do not add up: merge "
            "one into the base to keep both",
            *(folder.path, len(names), names[0]),
        )
