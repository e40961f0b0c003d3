"""Whether two checkpoints, of whatever forms, are the same model."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.folder import Folder, Weights
from accessory.checkpoint.layouts import MISTRAL
from accessory.checkpoint.merge import group_of
from accessory.checkpoint.write import AT_ONCE
from accessory.config import ModelArgs, differences
from accessory.parallel.box import Box
from accessory.progress import showing

# Settings that do not change what the model computes.
_FREE = ("max_batch_size", "max_seq_len", "load_balancing_weight", "z_loss_weight")


@dataclass
class Difference:
    """What sets two checkpoints apart.

    Attributes:
        settings: those in which they differ, each with both values.
        missing: parameters that only one of them holds, each with that one's folder.
        groups: of each group of tensors the largest absolute difference; infinite where only one has a NaN.
        most: what may be passed over.
    """

    most: float = 0.0
    settings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    groups: dict[str, float] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether nothing is beyond ``most``."""
        return not self.settings and not self.missing and all(value <= self.most for value in self.groups.values())

    def lines(self) -> Iterator[str]:
        """For a reader."""
        for setting in self.settings:
            yield f"config          {setting}"
        for name in self.missing[:3]:
            yield f"missing         {name}"
        if self.missing[3:]:
            yield f"missing         {len(self.missing) - 3} more"
        for group, value in self.groups.items():
            yield f"{group:15} {value:.3g}" if value else f"{group:15} equal"
        yield "the same model" if self.same else "not the same model"


def diff(first: str | Path, second: str | Path, *, atol: float = 0.0) -> Difference:
    """Compare two checkpoints parameter by parameter, whatever their layouts and dtypes.

    Args:
        atol: absolute differences up to it are passed over.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: a folder cannot be read.
    """
    folders = [Folder(first), Folder(second)]
    sizes = [folder.stored_args() for folder in folders]
    found = Difference(most=atol, settings=list(_settings(*sizes)))
    if found.settings:
        return found
    weights = [folder.weights(args, partial=True) for folder, args in zip(folders, sizes, strict=True)]
    held = weights[0].held | weights[1].held
    sources = [source for source in MISTRAL.sources(sizes[0], 1) if source.written and source.parameter in held]
    with showing("comparing", len(sources), unit="tensors") as comparing:
        for source in comparing.over(sources):
            own = [one for one in weights if one.holds(source.parameter, source.box)]
            if len(own) == 2:
                group = group_of(source.key)
                found.groups[group] = max(found.groups.get(group, 0.0), _largest(weights, source.parameter, source.box))
            else:
                holder = own[0].folder.path if own else "neither, whole"
                found.missing.append(f"{source.key}: only in {holder}")
    return found


def _settings(first: ModelArgs, second: ModelArgs) -> Iterator[str]:
    for name, one, other in differences(dataclasses.asdict(first), dataclasses.asdict(second)):
        if name not in _FREE:
            yield f"{name}: {one} and {other}"


def _largest(weights: Sequence[Weights], name: str, box: Box) -> float:
    """The largest absolute difference in a part of a parameter, a few of its rows at a time."""
    return max(_distance(*(one.read(name, part) for one in weights)) for part in box.pieces(AT_ONCE))


def _distance(first: Tensor, second: Tensor) -> float:
    if first.dtype == second.dtype and torch.equal(first, second):
        return 0.0
    one, other = first.double(), second.double()
    gaps = (one - other).abs()
    # Two infinities of one sign, and two NaN, are alike.
    gaps[(one == other) | (one.isnan() & other.isnan())] = 0
    return float(gaps.nan_to_num(nan=math.inf, posinf=math.inf).max())
