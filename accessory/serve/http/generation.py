"""Between the event loop and the engine: what an HTTP request asks for is written, and ended when nobody waits for it.

A request may ask for more answers than the engine takes at once (64 prompts, n = 8); they are handed over a few at a
time, so that one client does not fill the queue, and are refused only where not even the first finds a place.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from accessory.generation.sampling import Sampling
from accessory.serve.http.errors import ApiError, of_engine, unavailable
from accessory.serve.http.metrics import Account, Metrics, Watch
from accessory.serve.request import Busy, Engine, Event, Stream

Result = TypeVar("Result")
SECONDS_BETWEEN_TRIES = 0.05


@dataclass(frozen=True, kw_only=True)
class Job:
    """One answer to write; the attributes are those of `Request`."""

    tokens: Sequence[int]
    sampling: Sampling
    reads_only: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Generations:
    """The generations of a server; ends them when it closes.

    Attributes:
        metrics: what is measured of each.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._open: set[Generation] = set()
        self._closed: str | None = None

    def begin(self, engine: Engine, jobs: Sequence[Job], account: Account) -> "Generation":
        """Prepare to write answers.

        Args:
            account: of the request that asks for them.

        Raises:
            ApiError: the server closes.
        """
        if self._closed is not None:
            raise unavailable(self._closed)
        return Generation(self, engine, jobs, account)

    @property
    def busy(self) -> bool:
        """Whether anything is being written."""
        return bool(self._open)

    def close(self, reason: str) -> None:
        """End all generations; their clients are told why. Call it in the event loop."""
        self._closed = reason
        for generation in list(self._open):
            generation.fail(unavailable(reason))

    def _enter(self, generation: "Generation") -> None:
        self._open.add(generation)

    def _leave(self, generation: "Generation") -> None:
        self._open.discard(generation)


class Generation:
    """The answers to one HTTP request; use it in one event loop, once.

    `start` hands the first answers over and raises ApiError where they are refused; `events` then gives what is
    written, as pairs of the answer's number and an Event, until each answer has finished. `close` ends what goes on.

    Attributes:
        account: of the request.
    """

    def __init__(self, among: Generations, engine: Engine, jobs: Sequence[Job], account: Account) -> None:
        self._among, self._engine, self._jobs = among, engine, jobs
        self.account = account
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._waiting = deque(range(len(jobs)))
        self._running: dict[int, Stream] = {}
        self._watches: dict[int, Watch] = {}
        self._window = max(1, engine.load.slots)

    def start(self) -> None:
        """Hand over the first answers.

        Raises:
            ApiError: no place for any, or a request that the engine refuses.
        """
        self._among._enter(self)
        try:
            self._hand_over()
        except Exception:
            self.close()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What is written, in the order in which it is.

        Raises:
            ApiError: the ranks are lost, or the server closes.
        """
        while self._running or self._waiting:
            if not self._running:  # others were faster to the queue's free places
                await asyncio.sleep(SECONDS_BETWEEN_TRIES)
                self._hand_over()
                continue
            index, event = await self._news.get()
            if isinstance(event, Exception):
                raise _shown(event)
            self._watches[index].note(event)
            if event.finish == "cancelled":
                raise unavailable("the server ended this answer")
            if event.finish is not None:
                del self._running[index]
                self._hand_over()
            yield index, event

    def fail(self, error: ApiError) -> None:
        """Let `events` raise this."""
        self._news.put_nowait((0, error))

    def close(self) -> None:
        """End what is still being written."""
        for stream in self._running.values():
            stream.cancel()
        self._running.clear()
        self._waiting.clear()
        self._among._leave(self)

    def _hand_over(self) -> None:
        while self._waiting and len(self._running) < self._window:
            index = self._waiting[0]
            try:
                self._running[index] = self._submit(index)
            except Busy as error:
                if not self._watches:
                    raise _shown(error) from error
                return  # the rest of a request that has begun goes on when there is room
            except Exception as error:
                raise _shown(error) from error
            self._waiting.popleft()

    def _submit(self, index: int) -> Stream:
        job = self._jobs[index]
        watch = self._among.metrics.watch(self.account)

        def on_event(event: Event | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._news.put_nowait, (index, event))

        stream = self._engine.submit(
            job.tokens,
            job.sampling,
            reads_only=job.reads_only,
            seed=job.seed,
            logprobs=job.logprobs,
            prompt_logprobs=job.prompt_logprobs,
            on_event=on_event,
        )
        self._watches[index] = watch
        return stream


async def unless_gone(request: Request, work: Callable[[], Awaitable[Result]]) -> Result:
    """Do the work while the client stays.

    Raises:
        ClientGone: its connection was dropped; the work is cancelled.
    """
    task = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return await task
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _shown(error: Exception) -> Exception:
    """As the client is told, or as it is where the server is to blame."""
    return of_engine(error) or error
