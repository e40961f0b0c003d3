"""Examples of different lengths as the rows of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Token ids and labels of an example, of equal length.
Example = tuple[NDArray[np.integer], NDArray[np.integer]]


class Batch(NamedTuple):
    """The rows of a micro-batch, padded on the right with 0.

    Attributes:
        examples: int64 (rows, length), token ids.
        labels: int64, same shape; 0 is not learned.
        lengths: of the pieces that see one another, row by row, padding included; None: each row is one.
    """

    examples: Tensor
    labels: Tensor
    lengths: tuple[int, ...] | None = None


def collate(rows: Sequence[Sequence[Example]]) -> Batch:
    """Rows of one or several examples each, as long as the longest.

    Without a row there is one of two paddings: it has a token to predict from, so that it runs as others do,
    and neither the loss (label 0) nor the balance of the experts (token 0) counts it.
    """
    longest = max((sum(len(tokens) for tokens, _ in row) for row in rows), default=2)
    examples, labels = np.zeros((2, max(len(rows), 1), longest), dtype=np.int64)
    lengths: list[int] = []
    for number, row in enumerate(rows):
        place = 0
        for tokens, learned in row:
            end = place + len(tokens)
            examples[number, place:end] = tokens
            labels[number, place + 1 : end] = learned[1:]  # what comes before the first is another example
            lengths.append(len(tokens))
            place = end
        lengths += [longest - place] if place < longest else []
    shared = any(len(row) > 1 for row in rows)
    return Batch(torch.from_numpy(examples), torch.from_numpy(labels), tuple(lengths) if shared else None)
