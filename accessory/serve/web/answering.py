"""An answer on its way to a page: the engine's events gathered into pictures of how far it is."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from accessory.generation.sampling import Sampling
from accessory.serve.request import Engine, Event, Finish

# A page is told of what is new at most so often, and at least so often while nothing is: only by writing to it does
# the server notice that a tab was closed.
_SHORTEST, _LONGEST = 0.05, 0.5

Route = tuple[tuple[int, ...], ...]
"""The experts (layers, top_k) that took a token."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer as far as it is known.

    Attributes:
        text: what the tokens add to the prompt's, so it may begin with a space.
        prompt, sampling: what was asked.
        tokens: those of the text, and behind them the one or more that ended it.
        routes: of ``tokens`` in their order; the last ones may lack theirs.
        first, last: seconds from the question to the first token, and to the last one so far; None before it.
        finish: why it ended; None while it goes on.
    """

    text: str = ""
    prompt: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    tokens: tuple[int, ...] = ()
    routes: tuple[Route, ...] = ()
    first: float | None = None
    last: float | None = None
    finish: Finish | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first; 0 where there are none."""
        if self.first is None or self.last is None or self.last <= self.first:
            return 0.0
        return (len(self.tokens) - 1) / (self.last - self.first)


class Answering:
    """A request of a page. It begins with the object; `stop` must follow, whatever happens.

    Raises:
        ValueError, Busy, RankLost: as ``engine.submit`` does.
    """

    def __init__(self, engine: Engine, tokens: Sequence[int], sampling: Sampling) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[float, Event | Exception]] = asyncio.Queue()
        self._prompt, self._sampling = tuple(tokens), sampling
        self._start = time.monotonic()
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._routes: list[Route] = []
        self._first: float | None = None
        self._last: float | None = None
        self._finish: Finish | None = None
        self._stream = engine.submit(tokens, sampling, routes=True, on_event=self._tell)

    async def progress(self) -> Answer:
        """The answer a moment later.

        Raises:
            RankLost: there will be no more of it.
        """
        await asyncio.sleep(_SHORTEST)
        with contextlib.suppress(TimeoutError):
            self._take(*await asyncio.wait_for(self._news.get(), _LONGEST))
        while not self._news.empty():
            self._take(*self._news.get_nowait())
        return self.answer

    @property
    def answer(self) -> Answer:
        """As far as it is known."""
        return Answer(
            text="".join(self._text),
            prompt=self._prompt,
            sampling=self._sampling,
            tokens=tuple(self._tokens),
            routes=tuple(self._routes),
            first=self._first,
            last=self._last,
            finish=self._finish,
        )

    def stop(self) -> None:
        """Let the model end the answer here, however far it is; `progress` brings the end to whoever still asks."""
        self._stream.cancel()

    def _tell(self, event: Event | Exception) -> None:
        """Called from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the page's loop has ended before the engine
            self._loop.call_soon_threadsafe(self._news.put_nowait, (time.monotonic() - self._start, event))

    def _take(self, seconds: float, event: Event | Exception) -> None:
        if isinstance(event, Exception):
            raise event
        if event.tokens:
            self._first = seconds if self._first is None else self._first
            self._last = seconds
        self._text.append(event.text)
        self._tokens += event.tokens
        self._routes += event.routes
        self._finish = event.finish
