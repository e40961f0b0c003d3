"""From a text to the token ids that a model is trained on, and to those among them that it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accessory.text.tokenizer import Tokenizer

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrainingText:
    """A whole text, and what of it is learned.

    `spans` are begin and end of the learned parts in characters, the end excluded; `learn_eos` whether the end
    token is learned too; `answered` whether any of the answers says something.
    """

    text: str
    spans: Sequence[tuple[int, int]]
    learn_eos: bool
    answered: bool


def encode_example(text: TrainingText, tokenizer: Tokenizer, *, max_words: int) -> tuple[Ids, Ids, bool]:
    """Token ids and labels of `text`, of equal length, at most `max_words`; and whether they were cut there.

    The ids are begin token, text, end token, cut on the right. A label is its id where the token is learned and
    0 elsewhere: id 0 itself is never learned.

    The text is encoded once, as a prompt is when the model is used, and a token is learned where it stands for a
    character of a span, be it among others.
    """
    ids, offsets = tokenizer.encode_with_spans(text.text)
    tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=np.int64)
    learned = np.zeros(len(tokens), dtype=bool)
    if ids:
        begins, ends = np.array(offsets, dtype=np.int64).T
        for begin, end in text.spans:
            # Some bytes of a character have an empty span at its begin, hence the second way to lie inside.
            learned[1:-1] |= (begins < end) & ((ends > begin) | (begins >= begin))
    learned[-1] = text.learn_eos
    labels = np.where(learned, tokens, 0)
    return tokens[:max_words], labels[:max_words], len(tokens) > max_words
