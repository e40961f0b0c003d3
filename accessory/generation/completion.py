"""One completion on its way: the tokens that a model adds to a prompt, their text, and where it ends."""

from collections.abc import Sequence
from typing import Literal, Protocol

from accessory.generation.detokenizer import StreamableTokenizer
from accessory.generation.sampling import Sampling
from accessory.generation.stopping import TextStream

Finish = Literal["stop", "length"]


class EndingTokenizer(StreamableTokenizer, Protocol):
    """A tokenizer that knows the tokens at which a text ends."""

    eos_ids: frozenset[int]


def end_ids(tokenizer: EndingTokenizer, sampling: Sampling) -> frozenset[int]:
    """The tokens that end a completion; they have no part in its text."""
    return tokenizer.eos_ids.union(sampling.stop_ids)


class Completion:
    """A prompt's completion, token by token.

    Attributes:
        written: tokens so far, the one that ended it among them.
        last_token: the newest of them; -1 before the first.
        finish: why it ended; None while it goes on.
    """

    def __init__(self, prompt: Sequence[int], tokenizer: EndingTokenizer, sampling: Sampling) -> None:
        self.written = 0
        self.last_token = -1
        self.finish: Finish | None = None
        self._most, self._ends = sampling.max_gen_len, end_ids(tokenizer, sampling)
        self._stream = TextStream(tokenizer, sampling.stop, after=prompt, lead=sampling.lead, tail=sampling.tail)
        self._told = 0

    @property
    def text(self) -> str:
        """What may be shown now: what the tokens add to the prompt's text. It is never taken back."""
        return self._stream.text

    def push(self, token: int) -> str:
        """Take the next token; returns the characters that may be shown now. Sets ``finish`` at the end."""
        self.last_token = token
        self.written += 1
        ended = token in self._ends
        if not ended:
            self._stream.push(token)
        if ended or self._stream.stopped:
            self.finish = "stop"
        elif self.written == self._most:
            self.finish = "length"
        if self.finish:
            self._stream.finish(ended=ended)
        if self._stream.stopped:  # perhaps only now: one that was held back for a longer stop string
            self.finish = "stop"
        told, self._told = self._told, len(self.text)
        return self.text[told:]
