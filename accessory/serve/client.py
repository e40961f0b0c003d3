"""The asking side of an engine: it checks requests, numbers them, and hands out what the first rank reports."""

import inspect
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from accessory.config import ModelArgs
from accessory.errors import first_line
from accessory.generation.sampling import Sampling
from accessory.model.meta import MetaModel
from accessory.serve.messages import Answer, Call, Cancel, Close, Failed, Order, Report, Step, Submit
from accessory.serve.request import Busy, Event, Load, OnEvent, RankLost, Request
from accessory.serve.stream import AnswerStream
from accessory.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# What may be called on all ranks.
_METHODS = {
    name: inspect.signature(getattr(MetaModel, name), eval_str=False)
    for name in ("compute_logits", "evaluate_examples")
}
_LONGEST_WAIT = 60


class Client:
    """An `Engine` whose ranks are reached through ``send`` and whose reports are handed to `take`.

    Args:
        queued: requests that may wait beside those that run.
        send: takes an order to the first rank; raises EOFError where that is gone.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        args: ModelArgs,
        name: str,
        slots: int,
        queued: int,
        send: Callable[[Order], None],
    ) -> None:
        self.tokenizer, self.args, self.name = tokenizer, args, name
        self._slots, self._queued, self._send = slots, queued, send
        self._load = Load(slots=slots, cache_capacity=slots * args.max_seq_len)
        self._failure: RankLost | None = None
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._streams: dict[int, AnswerStream] = {}
        self._calls: dict[int, queue.SimpleQueue[Answer | RankLost]] = {}
        self._pace = _Pace()

    @property
    def ready(self) -> bool:
        return self._failure is None

    @property
    def failure(self) -> str | None:
        return None if self._failure is None else str(self._failure)

    @property
    def load(self) -> Load:
        return self._load

    def submit(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        reads_only: bool = False,
        seed: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        routes: bool = False,
        on_event: OnEvent | None = None,
    ) -> AnswerStream:
        """Ask for an answer to a prompt; returns at once.

        Raises:
            ValueError: naming the setting; with its text for the prompt or the model's limits.
            Busy: as many wait as may.
            RankLost: the ranks are gone.
        """
        request = Request(
            tokens=tuple(tokens),
            sampling=sampling,
            reads_only=reads_only,
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            routes=routes,
        )
        check_request(request, vocab_size=self.tokenizer.n_words, max_seq_len=self.args.max_seq_len)
        number = next(self._numbers)
        stream = AnswerStream(on_event, lambda: self._order(Cancel(number)))
        with self._lock:
            if self._failure is not None:
                raise RankLost(str(self._failure))
            waiting = len(self._streams) - self._slots
            if waiting >= self._queued:
                raise Busy(max(0, waiting), self._pace.retry_after())
            self._streams[number] = stream
        self._order(Submit(number, request))
        return stream

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Let all ranks call a method of their MetaModel, between two steps; tensors come back on the CPU.

        Raises:
            ValueError: there is no such method to call.
            RankLost: the ranks are gone.
            Exception: what the method raises on the ranks.
        """
        if method not in _METHODS:
            raise ValueError(f"{method!r} cannot be called on the ranks; {', '.join(_METHODS)} can")
        _METHODS[method].bind(None, *args, **kwargs)
        number = next(self._numbers)
        answers: queue.SimpleQueue[Answer | RankLost] = queue.SimpleQueue()
        with self._lock:
            if self._failure is not None:
                raise RankLost(str(self._failure))
            self._calls[number] = answers
        try:
            self._order(Call(number, method, args, kwargs))
            answer = answers.get()
        finally:
            with self._lock:
                self._calls.pop(number, None)
        if isinstance(answer, RankLost):
            raise RankLost(str(answer))
        if answer.error is not None:
            raise answer.error
        return answer.result

    def close(self) -> None:
        """Let the ranks end; requests that are left end with RankLost."""
        self._order(Close())
        self.fail(RankLost("the engine was closed"))

    def take(self, report: Report) -> None:
        """Hand out what the first rank reports."""
        match report:
            case Step(events, load):
                self._load = load
                for number, event in events:
                    over = isinstance(event, Exception) or event.finish is not None
                    with self._lock:
                        stream = self._streams.pop(number, None) if over else self._streams.get(number)
                        if over:
                            self._pace.ended()
                    if stream is not None:
                        _give(stream, event)
            case Answer():
                with self._lock:
                    answers = self._calls.pop(report.number, None)
                if answers is not None:
                    answers.put(report)
            case Failed(error):
                self.fail(RankLost(first_line(str(error), otherwise=type(error).__name__)))

    def fail(self, reason: RankLost) -> None:
        """End all that runs; the first reason stays."""
        with self._lock:
            self._failure = self._failure or reason
            streams, self._streams = list(self._streams.values()), {}
            calls, self._calls = list(self._calls.values()), {}
        for stream in streams:
            _give(stream, reason)
        for answers in calls:
            answers.put(reason)

    def _order(self, order: Order) -> None:
        try:
            self._send(order)
        except EOFError:
            self.fail(RankLost("the ranks of the model are gone"))


def _give(stream: AnswerStream, event: Event | Exception) -> None:
    """Hand on an event; a receiver that fails harms no other."""
    try:
        stream.give(event)
    except Exception:
        logger.exception("an event could not be handed on")


def check_request(request: Request, *, vocab_size: int, max_seq_len: int) -> None:
    """Raise ValueError where a request makes no sense for a model, naming what is wrong."""
    request.sampling.check(max_seq_len)
    tokens, room = request.tokens, max_seq_len - request.sampling.max_gen_len
    if not tokens:
        raise ValueError("the prompt has no tokens: give it at least one")
    if request.reads_only and len(tokens) > max_seq_len:
        raise ValueError(f"the prompt has {len(tokens)} tokens, more than max_seq_len {max_seq_len}: shorten it")
    if len(tokens) > room and not request.reads_only:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens and max_gen_len is {request.sampling.max_gen_len}, together more "
            f"than max_seq_len {max_seq_len}: shorten it, or ask for at most {max_seq_len - len(tokens)} tokens"
        )
    for place, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"token {place} of the prompt is {token!r}, outside the vocabulary of {vocab_size}")
    if request.seed is not None and type(request.seed) is not int:
        raise ValueError(f"seed must be a whole number or None, not {request.seed!r}")
    for setting in ("logprobs", "prompt_logprobs"):
        count = getattr(request, setting)
        if count is not None and (type(count) is not int or count < 0):
            raise ValueError(f"{setting} must be None or a whole number of at least 0, not {count!r}")


class _Pace:
    """How fast requests have been ending lately."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds = 1.0  # between two ends, on average

    def ended(self) -> None:
        now = time.monotonic()
        if self._last is not None:
            self._seconds += 0.1 * (now - self._last - self._seconds)
        self._last = now

    def retry_after(self) -> int:
        """Whole seconds after which a place is likely to be free."""
        return min(_LONGEST_WAIT, max(1, math.ceil(self._seconds)))
