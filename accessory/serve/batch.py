"""Which requests run, and what they do next. Nothing here computes: a sequence knows its state, a batch decides."""

import heapq
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from accessory.generation.completion import Completion, EndingTokenizer
from accessory.serve.request import Request, TokenScore


class Sequence(Completion):
    """A request on its way to becoming an answer: it waits, its prompt is read, its answer is written, it ends.

    Of the answer it knows what a `Completion` does.

    Attributes:
        number: by which its events are known.
        slot: of the cache; None while it waits and after its end.
        read: tokens of the prompt that are in the cache.
        prompt_scores: of what was read so far, where the request asks for them.
    """

    def __init__(self, number: int, request: Request, tokenizer: EndingTokenizer) -> None:
        super().__init__(request.tokens, tokenizer, request.sampling)
        self.number, self.request = number, request
        self.slot: int | None = None
        self.read = 0
        self.prompt_scores: list[TokenScore | None] = [None]
        self._random = random.Random(request.seed)

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.request.tokens) - self.read

    @property
    def held(self) -> int:
        """Tokens in the cache: the newest one is read a step later."""
        return self.read + max(0, self.written - 1)

    def draw(self) -> float:
        """A number from [0, 1) for the next token; only chance that is used up counts."""
        return self._random.random() if self.request.sampling.temperature > 0 else 0.0


@dataclass(frozen=True)
class Reading:
    """The next step reads so many further tokens of these prompts, and adds a token to each of these answers."""

    rows: list[tuple[Sequence, int]]
    answers: list[Sequence]


@dataclass(frozen=True)
class Writing:
    """The next step adds a token to each of these answers."""

    rows: list[Sequence]


class Batch:
    """The requests that wait, in the order in which they came, and those that run, each in a slot of its own.

    A step that reads prompts goes on with all answers, so that nobody waits for a turn and the weights are read once
    for both (Agrawal et al., 2024, https://arxiv.org/abs/2403.02310). It takes at most ``prefill_tokens`` of prompts
    and shares them: with 512 and prompts of 4,000, 100 and 30 unread tokens the shorter two are read whole, and 382 of
    the long one.
    """

    def __init__(self, slots: int, prefill_tokens: int) -> None:
        assert prefill_tokens >= slots > 0
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.running: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._free = list(range(slots))

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running.values()
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Let a request wait for its turn."""
        self._waiting.append(sequence)

    def leave(self, sequence: Sequence) -> int | None:
        """Take out a request that waits or runs; returns the slot that it had."""
        slot, sequence.slot = sequence.slot, None
        if slot is None:
            self._waiting.remove(sequence)
        else:
            del self.running[slot]
            heapq.heappush(self._free, slot)
        return slot

    def next(self) -> Reading | Writing | None:
        """Seat whom there is room for, and decide the next step; None where there is nothing to do."""
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            self.running[sequence.slot] = sequence
        reading = [sequence for sequence in self.running.values() if sequence.unread]
        writing = [sequence for sequence in self.running.values() if not sequence.unread]
        if reading:
            return Reading(self._shared(reading), writing)
        return Writing(writing) if writing else None

    def _shared(self, reading: list[Sequence]) -> list[tuple[Sequence, int]]:
        """How many tokens of each prompt are read: equal shares, of which the short ones leave some to the long."""
        left, counts = self.prefill_tokens, {}
        for place, sequence in enumerate(sorted(reading, key=lambda sequence: sequence.unread)):
            counts[sequence.number] = min(sequence.unread, left // (len(reading) - place))
            left -= counts[sequence.number]
        return [(sequence, counts[sequence.number]) for sequence in reading]
