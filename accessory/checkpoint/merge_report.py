"""What a merge has done to the weights, for a reader."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accessory.config import PEFT_TYPES

BIASES = "bias"
# What stands in the keys of a group of weights; the first that does names it.
_GROUPS = (
    *(BIASES, "wq", "wk", "wv", "wo", "w1", "w2", "w3", "b1", "b2", "b3"),
    *("sinks", "norm", "gate", "tok_embeddings", "output"),
)
_WORTH_SAYING = 0.001


@dataclass
class Change:
    """How far the weights of a group have moved, in sums of squares.

    Attributes:
        moved: of the change, as the adapter asks for it.
        before: of the weights before.
        lost: of what rounding to the base's dtype left out of the change, or added to it.
        dtype: the base's.
    """

    moved: float = 0.0
    before: float = 0.0
    lost: float = 0.0
    dtype: torch.dtype = torch.float32

    def add(self, change: Tensor | None, before: Tensor, written: Tensor) -> None:
        """Count a tensor; no ``change`` is one of zero."""
        self.before += _square(before)
        self.dtype = before.dtype
        if change is not None:
            self.moved += _square(change)
            self.lost += _square(written.float() - before.float() - change)

    @property
    def share(self) -> float:
        """Norm of the change over the norm of the weights."""
        return math.sqrt(self.moved / self.before) if self.before else math.sqrt(self.moved)

    @property
    def lost_share(self) -> float:
        """Norm of what rounding lost over the norm of the change."""
        return math.sqrt(self.lost / self.moved) if self.moved else 0.0

    def __str__(self) -> str:
        text = f"moved by {self.share:.3%}"
        if self.lost_share < _WORTH_SAYING:
            return text
        return f"{text}, of which rounding to {str(self.dtype).removeprefix('torch.')} lost {self.lost_share:.1%}"


@dataclass
class MergeReport:
    """What a merge has done.

    Attributes:
        changes: of each group of weights (wq, ..., w3, norm, bias).
        biases: biases are kept; the result is then of llama_type "mistral_peft".
        untrained: the adapter changes nothing; what rounding swallows is a change.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    biases: bool = False

    def change_of(self, key: str) -> Change:
        """That of the group which a key belongs to."""
        return self.changes.setdefault(group_of(key), Change())

    @property
    def untrained(self) -> bool:
        return not any(change.moved for change in self.changes.values())

    def lines(self) -> Iterator[str]:
        """For a reader; each group's change relative to its weights."""
        if self.untrained:
            yield "the adapter is untrained and changes nothing: the result is the base"
        for group in _GROUPS:
            change = self.changes.get(group)
            if change is not None and change.moved and group != BIASES:
                yield f"{group:15} {change}"
        if self.biases:
            yield f"biases          kept beside the weights: llama_type {PEFT_TYPES[0]}, lora_rank -1"


def group_of(key: str) -> str:
    """The group of weights that a key of our names belongs to."""
    return next(group for group in _GROUPS if any(group in part for part in key.split(".")))


def _square(tensor: Tensor) -> float:
    norm: float = torch.linalg.vector_norm(tensor.float()).item()
    return norm**2
