"""One loop that turns prompts into text, for a batch as for a stream.

It stands on what a Transformer promises (`prefill` and `decode`) and on nothing else of the model. Sequences take
slots of the cache as they become free; every rank runs the same loop on the same tokens, which the first rank of
the model chooses and broadcasts.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.config import ModelArgs
from accessory.generation.completion import Completion, EndingTokenizer, Finish
from accessory.generation.sampling import Sampling, not_finite, sample
from accessory.parallel.state import ParallelState, agreed, on_all_ranks

# Prompts are read in pieces of this many tokens, which bounds the memory of the experts' activations.
PREFILL_TOKENS = 2048

# A cache has room for the longest sequence in each of its slots: where one needs more than this many tokens there are
# fewer slots, or a single long prompt among short ones would take the memory of a whole batch of its like. It is the
# context that a model has unless told otherwise.
TOKENS_FOR_A_SLOT = 4096

# What the first rank broadcasts in place of tokens where it failed to choose any.
_FAILED = -2


class Cache(Protocol):
    """What the engine asks of a cache."""

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> None: ...
    def free(self, slot: int) -> None: ...


C = TypeVar("C", bound=Cache)


class Model(Protocol[C]):
    """What the engine asks of a Transformer."""

    args: ModelArgs
    state: ParallelState

    def new_cache(self, slots: int, max_seq_len: int) -> C: ...
    def prefill(self, tokens_T: Tensor, lengths: Sequence[int], slots: Sequence[int], cache: C) -> Tensor: ...
    def decode(self, tokens_S: Tensor, cache: C, active_S: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Progress:
    """What is known of one completion after a step.

    Attributes:
        index: of its prompt.
        text: all so far.
        tokens: all so far, the one that ended it among them.
        finish: why it ended: a token or a stop string ("stop"), or its length; None while it goes on.
    """

    index: int
    text: str
    tokens: int
    finish: Finish | None


class _Sequence(Completion):
    """A prompt on its way to becoming a completion."""

    def __init__(self, index: int, prompt: Sequence[int], tokenizer: EndingTokenizer, sampling: Sampling) -> None:
        super().__init__(prompt, tokenizer, sampling)
        self.index, self.prompt = index, list(prompt)

    def advance(self, token: int) -> Progress:
        """Take the next token; says how far it is now."""
        self.push(token)
        return Progress(self.index, self.text, self.written, self.finish)


def complete(
    model: Model[C], tokenizer: EndingTokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[list[Progress]]:
    """Complete prompts of token ids; after every step yields the progress of the sequences that moved.

    Collective over the model's ranks: all must iterate alike. Each prompt must have at least one token and leave
    room for ``sampling.max_gen_len`` within the model's max_seq_len.
    """
    waiting = deque(_Sequence(index, prompt, tokenizer, sampling) for index, prompt in enumerate(prompts))
    longest = min(max(len(prompt) for prompt in prompts) + sampling.max_gen_len, model.args.max_seq_len)
    slots = _slots_for(len(prompts), longest, model.args.max_batch_size)
    with torch.inference_mode(False):  # the caller may leave such a mode while the generator lives on
        cache = agreed(model.state, lambda: model.new_cache(slots, longest))  # one rank may be out of memory
    running: dict[int, _Sequence] = {}
    while waiting or running:
        joining = {slot: waiting.popleft() for slot in range(slots) if slot not in running and waiting}
        if joining:
            logits_RV = _prefill(model, cache, joining)
            running.update(joining)
            moved = joining
        else:
            logits_RV = _decode(model, cache, running, slots)
            moved = dict(running)
        tokens = _choose(model.state, logits_RV, sampling)
        yield [sequence.advance(token) for sequence, token in zip(moved.values(), tokens, strict=True)]
        for slot, sequence in moved.items():
            if sequence.finish:
                del running[slot]
                cache.free(slot)


def _slots_for(count: int, longest: int, most: int) -> int:
    """How many of so many sequences run at once, of which the longest takes ``longest`` tokens."""
    return min(count, most, max(1, most * TOKENS_FOR_A_SLOT // longest))


@torch.no_grad()
def _prefill(model: Model[C], cache: C, joining: dict[int, _Sequence]) -> Tensor:
    """Read prompts, at most PREFILL_TOKENS of them at a time; logits (R, V) of their last tokens, in order."""
    unread = deque((slot, sequence.prompt) for slot, sequence in joining.items())
    finals: list[Tensor] = []
    while unread:
        tokens: list[int] = []
        rows: list[tuple[int, int]] = []
        ends: list[int] = []
        while unread and len(tokens) < PREFILL_TOKENS:
            slot, rest = unread.popleft()
            piece = rest[: PREFILL_TOKENS - len(tokens)]
            if len(piece) < len(rest):
                unread.appendleft((slot, rest[len(piece) :]))
            else:
                ends.append(len(rows))
            tokens += piece
            rows.append((slot, len(piece)))
        taken = torch.tensor(tokens, device=model.state.device)
        logits_RV = model.prefill(taken, [n for _, n in rows], [slot for slot, _ in rows], cache)
        finals.append(logits_RV[ends])
    return torch.cat(finals)


@torch.no_grad()
def _decode(model: Model[C], cache: C, running: dict[int, _Sequence], slots: int) -> Tensor:
    """One step of all running sequences; logits (R, V) in the order of ``running``."""
    last = [running[slot].last_token if slot in running else 0 for slot in range(slots)]
    active = [slot in running for slot in range(slots)]
    device = model.state.device
    logits_SV = model.decode(torch.tensor(last, device=device), cache, torch.tensor(active, device=device))
    cache.extend(list(running), [1] * len(running))
    return logits_SV[list(running)]


@torch.no_grad()
def _choose(state: ParallelState, logits_RV: Tensor, sampling: Sampling) -> list[int]:
    """Sample on the model's first rank; equal seeds would not give equal samples on different ranks."""
    tokens = torch.full(logits_RV.shape[:1], _FAILED, dtype=torch.int64, device=logits_RV.device)
    failure: Exception | None = None
    if state.is_first:
        try:
            tokens = sample(logits_RV, sampling.temperature, sampling.top_p)
        except Exception as error:
            failure = error
    if state.mp_size > 1:
        dist.broadcast(tokens, group=state.mp_group, group_src=0)
    chosen: list[int] = tokens.tolist()
    if _FAILED in chosen:
        state.agree(failure)
    if min(chosen) < 0:
        raise on_all_ranks(not_finite())
    return chosen
