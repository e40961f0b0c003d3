"""Clients of an OpenAI-compatible server that ask at once, and what they had to wait for."""

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

SECONDS = 600


@dataclass
class Outcome:
    """What a number of clients got.

    Attributes:
        first: seconds from each request to the first text of its answer.
        tokens: of all answers.
        seconds: from the first request to the last answer.
        failures: what went wrong with each request that was not answered.
    """

    first: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def percentile(self, percent: int) -> float:
        """Seconds to the first text, of that share of the requests at most."""
        if len(self.first) < 2:
            return self.first[0] if self.first else float("nan")
        return statistics.quantiles(self.first, n=100, method="inclusive")[percent - 1]


def ask_at_once(url: str, model: str, prompts: Sequence[str], *, clients: int, max_tokens: int) -> Outcome:
    """Let so many clients ask until all prompts are answered; each asks one after another, in a stream."""
    return asyncio.run(_ask_at_once(url, model, prompts, clients, max_tokens))


async def _ask_at_once(url: str, model: str, prompts: Sequence[str], clients: int, max_tokens: int) -> Outcome:
    outcome = Outcome()
    remaining = iter(prompts)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
        start = time.perf_counter()

        async def work() -> None:
            for prompt in remaining:
                body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
                body["stream_options"] = {"include_usage": True}
                try:
                    await _ask(client, body, outcome)
                except (httpx.HTTPError, ValueError) as error:
                    outcome.failures.append(f"{type(error).__name__}: {error}")

        await asyncio.gather(*(work() for _ in range(clients)))
        outcome.seconds = time.perf_counter() - start
    return outcome


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], outcome: Outcome) -> None:
    """Raises ValueError where the answer is refused or not finished."""
    start = time.perf_counter()
    first: float | None = None
    tokens, finished = 0, False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code} {(await answer.aread()).decode()[:200]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line.removeprefix("data: "))
            if "error" in part:
                raise ValueError(str(part["error"]))
            tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
            for choice in part["choices"]:
                finished |= choice.get("finish_reason") is not None
                if first is None and choice.get("text"):
                    first = time.perf_counter() - start
    if not finished:
        raise ValueError("the answer was cut off")
    outcome.tokens += tokens
    if first is not None:
        outcome.first.append(first)


def prompts_of(text: str, count: int) -> list[str]:
    """So many different pieces of a text, of 40 to 400 characters."""
    sizes = itertools.cycle((40, 120, 400, 80, 200))
    starts = range(0, max(1, len(text) - 400), max(1, (len(text) - 400) // count))
    return [text[start : start + size] for start, size in zip(starts, sizes, strict=False)][:count]
