"""What an engine has done and how busy it is, and which experts did it."""

import time
from collections.abc import Sequence as Rows

from accessory.model.cache import KVCache
from accessory.serve.batch import Batch, Sequence
from accessory.serve.request import Load

# The experts' counts lie on the device: they are asked for so often at most, in seconds, and when the work is done.
_COUNT_EVERY = 0.25


class Tally:
    """Counts since the start."""

    def __init__(self, cache: KVCache) -> None:
        self.prompt_tokens = self.generated_tokens = self.finished = self.cancelled = 0
        self._cache = cache
        self._experts: tuple[tuple[int, ...], ...] = ()
        self._counted = 0.0

    def load(self, batch: Batch) -> Load:
        """A snapshot."""
        cache, now = self._cache, time.monotonic()
        if batch.idle or now - self._counted > _COUNT_EVERY:
            self._experts = cache.by_layer(cache.expert_counts.tolist())
            self._counted = now
        return Load(
            slots=cache.slots,
            running=len(batch.running),
            waiting=batch.waiting,
            cache_tokens=sum(sequence.held for sequence in batch.running.values()),
            cache_capacity=cache.slots * cache.max_seq_len,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            finished=self.finished,
            cancelled=self.cancelled,
            expert_tokens=self._experts,
        )


def newest_routes(cache: KVCache, rows: Rows[Sequence]) -> dict[int, tuple[tuple[int, ...], ...]]:
    """The experts (layers, top_k) of the token that each of these has just read, by number, where it asks for them.

    A layer without experts has none.
    """
    rows = [sequence for sequence in rows if sequence.request.routes]
    if not rows:  # nothing is asked of the device
        return {}
    assert cache.routes is not None
    slots = [sequence.slot for sequence in rows if sequence.slot is not None]
    places = [cache.length(slot) - 1 for slot in slots]
    found = cache.routes[:, slots, places].transpose(0, 1).tolist()
    return {sequence.number: cache.by_layer(layers) for sequence, layers in zip(rows, found, strict=True)}
