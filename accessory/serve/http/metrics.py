"""What is measured of the server, in Prometheus' text format."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from accessory.serve.request import Engine, Event, Load

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SECONDS_OF_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts and times of one server.

    Args:
        engine: gives the engine whose load is told, or None while there is none.
    """

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "accessory_requests",
            "HTTP requests answered, by path and status; 499: the client left before the answer.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._first = Histogram(
            "accessory_time_to_first_token_seconds",
            "From a request's arrival at the engine to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._each = Histogram(
            "accessory_time_per_output_token_seconds",
            "Of each finished answer: mean time of a token behind the first.",
            buckets=_SECONDS_OF_A_TOKEN,
            registry=self._registry,
        )
        self._whole = Histogram(
            "accessory_answer_seconds",
            "From a request's arrival at the engine to its last token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_LoadCollector(engine))

    def count_request(self, endpoint: str, status: int) -> None:
        """Note an HTTP request that was answered."""
        self._requests.labels(endpoint, str(status)).inc()

    def watch(self, account: "Account") -> "Watch":
        """Begin to measure one answer of a request."""
        return Watch(account, self._first, self._each, self._whole)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


@dataclass
class Account:
    """What one HTTP request took.

    Attributes:
        prompt_tokens: of all its prompts, each counted once; None: it came to no model.
        completion_tokens: of all its answers, as far as they were written.
        failure: the status that its stream would have had, had it not begun already.
    """

    prompt_tokens: int | None = None
    completion_tokens: int = 0
    failure: int | None = None


class Watch:
    """Takes the times of one answer, and puts its tokens down to its request's account."""

    def __init__(self, account: Account, first: Histogram, each: Histogram, whole: Histogram) -> None:
        self._account, self._histograms = account, (first, each, whole)
        self._start = time.perf_counter()
        self._first: float | None = None
        self._tokens = 0

    def note(self, event: Event) -> None:
        """Take the time of what was just written."""
        now = time.perf_counter()
        first, each, whole = self._histograms
        if event.tokens and self._first is None:
            self._first = now
            first.observe(now - self._start)
        self._tokens += len(event.tokens)
        self._account.completion_tokens += len(event.tokens)
        if event.finish not in (None, "cancelled"):
            whole.observe(now - self._start)
            if self._first is not None and self._tokens > 1:
                each.observe((now - self._first) / (self._tokens - 1))


class _LoadCollector(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        ready = engine is not None and engine.ready
        yield GaugeMetricFamily("accessory_ready", "1 while the model is loaded and its ranks live.", value=ready)
        load = Load() if engine is None else engine.load
        for name, text, value in (
            ("slots", "Answers that can be written at once.", load.slots),
            ("running_requests", "Answers being written.", load.running),
            ("waiting_requests", "Requests in the queue.", load.waiting),
            ("cache_tokens", "Tokens in the key/value cache.", load.cache_tokens),
            ("cache_capacity_tokens", "Tokens that the key/value cache can hold.", load.cache_capacity),
            ("cache_usage_ratio", "Share of it in use.", load.cache_tokens / max(1, load.cache_capacity)),
        ):
            yield GaugeMetricFamily(f"accessory_{name}", text, value=value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts read.", load.prompt_tokens),
            ("generated_tokens", "Tokens written; its rate is the throughput.", load.generated_tokens),
            ("finished_answers", "Answers that ended by themselves.", load.finished),
            ("cancelled_answers", "Answers that were ended by their client.", load.cancelled),
        ):
            yield CounterMetricFamily(f"accessory_{name}", text, value=value)
        experts = CounterMetricFamily(
            "accessory_expert_tokens", "Tokens that an expert took.", labels=("layer", "expert")
        )
        for layer, counts in enumerate(load.expert_tokens):
            for expert, count in enumerate(counts):
                experts.add_metric((str(layer), str(expert)), count)
        yield experts
