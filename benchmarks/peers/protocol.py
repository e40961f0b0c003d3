"""How a side of the comparison is spoken to: one JSON object a line, and one line for an answer.

This file is the end of the side, and of nothing but the standard library, since every side has a Python and packages of
its own. What a side has to say beside its answers goes to its error output. The calls, and what they are answered with:

    {"call": "load", ...}                        {"seconds": 1.9, "about": "torch 2.13.0", ...}
    {"call": "prefill", "count": 512}            {"seconds": 0.41}
    {"call": "decode", "batch": 8, "position": 100, "steps": 8}    {"seconds": 0.033, ...}: of one step

Each may name a "variant" of the side. What fails is answered with {"error": "..."}, and the side goes on.
"""

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

# Of every side's prompts: those of Mixtral's tokenizer that are no control tokens.
FIRST_TOKEN, TOKENS = 3, 32000
# Of a step at some position none is timed before these: the first ones lay out memory anew.
UNTIMED_STEPS = 2


class Side(Protocol):
    """A model that was loaded.

    Attributes:
        about: versions and settings that decide its speed, in words.
        facts: what else the answers to load hold.
    """

    about: str
    facts: dict[str, Any]

    def use(self, variant: str) -> None:
        """Compute as the variant does from now on."""

    def prefill(self, tokens: list[int]) -> None:
        """Read a prompt from its start on, until the logits of its last token are there."""

    def start(self, prompt: list[int], last: list[int], steps: int) -> None:
        """Hold as many sequences as ``last`` has tokens: each the prompt and one of these; ``steps`` will follow.

        The prompt is the same at each call with its length, so that what was read of it may be kept.
        """

    def step(self) -> None:
        """A token more of each sequence, the most likely one."""

    def stop(self) -> dict[str, Any]:
        """Forget the sequences; what else the answer holds."""


def serve(load: Callable[[dict[str, Any]], Side]) -> None:
    """Answer what comes on the standard input, until it ends.

    Args:
        load: makes the side of what came with the call.
    """
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    side: Side | None = None
    seen: set[tuple[Any, ...]] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["call"] == "load":
                start = time.perf_counter()
                side = load(asked)
                answer = {"seconds": time.perf_counter() - start, "about": side.about, **side.facts}
            else:
                assert side is not None
                answer = _measure(side, asked, seen)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # threads of a package need not agree


def _measure(side: Side, asked: dict[str, Any], seen: set[tuple[Any, ...]]) -> dict[str, Any]:
    variant = asked.get("variant")
    if variant is not None:
        side.use(variant)
    if asked["call"] == "prefill":
        count = asked["count"]
        if ("prefill", variant, count) not in seen:
            seen.add(("prefill", variant, count))
            if not asked.get("first"):
                side.prefill(random_tokens(count, 0))
        prompt = random_tokens(count, len(seen) + time.time_ns())  # one that no cache of prompts has seen
        return {"seconds": _seconds(lambda: side.prefill(prompt))}
    batch, position, steps = asked["batch"], asked["position"], asked["steps"]
    last = random_tokens(batch, 1)
    side.start(random_tokens(position, 2), last, UNTIMED_STEPS + steps)
    for _ in range(UNTIMED_STEPS):
        side.step()
    elapsed = _seconds(lambda: [side.step() for _ in range(steps)])
    return {"seconds": elapsed / steps, **side.stop()}


def random_tokens(count: int, seed: int) -> list[int]:
    """The same ones for a seed on every side."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST_TOKEN, TOKENS) for _ in range(count)]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _end_with_parent() -> None:
    """Die with the process that asks, also while stopped by it; where the system offers that."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
