"""Examples of different lengths as the rows of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def collate(rows: Sequence[tuple[NDArray[np.integer], NDArray[np.integer]]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels of `rows` as two int64 tensors (rows, longest), padded on the right with 0.

    Without a row there is one of two paddings: it has a token to predict from, so that it runs as others do,
    and neither the loss (label 0) nor the balance of the experts (token 0) counts it.
    """
    longest = max((len(tokens) for tokens, _ in rows), default=2)
    examples, labels = np.zeros((2, max(len(rows), 1), longest), dtype=np.int64)
    for row, (tokens, learned) in enumerate(rows):
        examples[row, : len(tokens)] = tokens
        labels[row, : len(learned)] = learned
    return torch.from_numpy(examples), torch.from_numpy(labels)
