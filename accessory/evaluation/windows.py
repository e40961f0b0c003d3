"""A plain text as windows over its tokens, each token scored once, behind as many others as its window gives it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Windows:
    """Windows of `length` tokens, each `stride` behind the one before; the last one ends with the text.

    In a window those tokens are scored that none before it had: with a stride below the length each has at least
    length - stride others before it, but for the first window's. Its first token is never scored, nor is that of any
    window where the stride is the length. These are the windows of transformers' guide to perplexity of fixed-length
    models; the mean here is over all scored tokens, where the guide's weighs every window's mean by its length.

    Args:
        tokens: of the whole text.

    Raises:
        ValueError: a length below 2, a stride that is not in 1 to the length, or a text of less than two tokens.
    """

    def __init__(self, tokens: Sequence[int], *, length: int, stride: int | None = None) -> None:
        stride = length if stride is None else stride
        if length < 2:
            raise ValueError(f"--max_seq_len is {length}: give 2 or more, of which one is predicted")
        if not 1 <= stride <= length:
            raise ValueError(f"--stride is {stride}: give 1 to --max_seq_len, {length}")
        if len(tokens) < 2:
            raise ValueError(f"a text of {len(tokens)} tokens has none to predict: give a longer --text")
        self._tokens, count = np.asarray(tokens, dtype=np.int64), len(tokens)
        last = max(0, -(-(count - length) // stride))
        self._begins = [number * stride for number in range(last + 1)]
        self._ends = [min(begin + length, count) for begin in self._begins]
        self.lengths: NDArray[np.int64] = np.array(self._ends) - np.array(self._begins)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        begin, end = self._begins[index], self._ends[index]
        seen = self._ends[index - 1] if index else 0
        return self._tokens[begin:end], np.arange(begin, end) >= seen

    def place(self, index: int) -> str:
        """The tokens that a window has."""
        return f"tokens {self._begins[index]} to {self._ends[index] - 1}"


def read_text(path: Path) -> str:
    """A text file as it is.

    Raises:
        OSError, ValueError: it cannot be read, is not UTF-8, or is empty; naming the file.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OSError(f"--text {path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 (at byte {error.start}): save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"--text {path} is empty: give a text to predict")
    return text
