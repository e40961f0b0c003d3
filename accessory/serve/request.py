"""What is asked of an engine, and what it answers: plain values that cross threads and processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from accessory.config import ModelArgs
from accessory.generation.sampling import Sampling
from accessory.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "cancelled"]


class Busy(Exception):
    """As many requests wait as may; try again later.

    Attributes:
        retry_after: seconds after which a place is likely to be free, at least 1.
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.waiting, self.retry_after = waiting, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return Busy, (self.waiting, self.retry_after)


class RankLost(RuntimeError):
    """The ranks of the model are gone; the message says what happened."""


@dataclass(frozen=True)
class TokenScore:
    """How probable the model found a token.

    Attributes:
        logprob: natural logarithm, of the distribution before temperature and top_p.
        top: the most probable tokens in its place with theirs, best first; as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to complete.

    Attributes:
        tokens: the prompt; at least one, and with ``sampling.max_gen_len`` at most the model's max_seq_len.
        reads_only: read the prompt, which may fill the context then, and write nothing.
        seed: equal seeds give equal answers, in float32 whatever runs beside them; None: from the system.
        logprobs: score every new token, with so many alternatives; None: do not.
        prompt_logprobs: the same for the tokens of the prompt.
        routes: tell which experts took each token of the answer.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    reads_only: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    routes: bool = False


@dataclass(frozen=True, kw_only=True)
class Event:
    """What one step added to an answer.

    Attributes:
        text: characters that may be shown now, to be appended; never taken back. All of them together are what the
            tokens add to the prompt's text, so the first may be a space.
        tokens: ids that were chosen. One that ends the answer is among them, and those of a stop string, or of the
            form's lead and tail, too.
        scores: one for each of ``tokens``, where the request asked for them.
        prompt_scores: in the first event, where asked for: one for each token of the prompt, None for the first.
        routes: the experts (layers, top_k) of further tokens of the answer, in the answer's order. A token is routed
            when it is read, one step after it was chosen, so these lag behind and the last token has none.
        finish: why the answer ended; None while it goes on.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore | None, ...] = ()
    routes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy an engine is, and what it has done since it started.

    Attributes:
        slots: requests that can run at once.
        cache_tokens, cache_capacity: tokens that the running requests hold, and all slots could.
        expert_tokens: (layers, experts) pairs of token and expert so far, prompts included.
    """

    slots: int = 0
    running: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    cache_capacity: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    expert_tokens: tuple[tuple[int, ...], ...] = ()


class Stream(Protocol):
    """A running request, seen from the side that asked."""

    def __iter__(self) -> Iterator[Event]: ...
    def cancel(self) -> None: ...


OnEvent = Callable[[Event | Exception], None]


class Engine(Protocol):
    """A model that answers several requests at once; safe to use from any thread."""

    tokenizer: Tokenizer
    args: ModelArgs
    name: str

    @property
    def ready(self) -> bool: ...
    @property
    def failure(self) -> str | None: ...
    @property
    def load(self) -> Load: ...

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
    ) -> Stream: ...
    def call(self, method: str, *args: Any, **kwargs: Any) -> Any: ...
    def close(self) -> None: ...
