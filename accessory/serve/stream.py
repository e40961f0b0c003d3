"""A running request, seen from the side that asked."""

import queue
from collections.abc import Callable, Iterator

from accessory.serve.request import Event, OnEvent


class AnswerStream:
    """The events of one request: to be iterated, or given to a function as they come.

    Whoever stops iterating early has cancelled.

    Args:
        on_event: called from the engine's thread, so it must not block.
        cancel: asks the ranks to end the request.
    """

    def __init__(self, on_event: OnEvent | None, cancel: Callable[[], None]) -> None:
        self._events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._give: OnEvent = on_event or self._events.put
        self._iterable = on_event is None
        self._ask = cancel
        self._over = False

    def __iter__(self) -> Iterator[Event]:
        """Blocks for each event; the last one has ``finish``.

        Raises:
            RankLost: the ranks are gone.
            FloatingPointError: the model's logits for this request are not finite.
        """
        assert self._iterable, "the events go to on_event"
        try:
            while not (self._over and self._events.empty()):
                event = self._events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request, where it has not ended; from any thread."""
        if not self._over:
            self._ask()

    def give(self, event: Event | Exception) -> None:
        """Take the next event from the engine."""
        if isinstance(event, Exception) or event.finish:
            self._over = True
        self._give(event)
