"""A dialogue with a model: the turns so far, and the prompt that they make within the model's context."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from accessory.serve.request import Finish
from accessory.text.chat import Message
from accessory.text.forms import Form

Turn = tuple[str, str]
"""A question and its answer."""

_LONG_TOKEN = 8  # characters; no text of words has such tokens on average


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model reads to answer a question.

    Attributes:
        dropped: turns, the oldest ones, for which there was no room.
    """

    tokens: tuple[int, ...]
    dropped: int = 0


def dialogue_prompt(form: Form, turns: Sequence[Turn], question: str, *, room: int) -> Prompt:
    """The prompt for a question that follows ``turns``, without as many of the oldest as leave it too long.

    Args:
        room: tokens of the prompt at most.

    Raises:
        ValueError: the question is empty, or too long by itself, or the form cannot say it.
    """
    if not question.strip():
        raise ValueError("the question is empty: write one")

    def asked(kept: int) -> list[int]:
        messages = [
            message
            for turn, answer in turns[len(turns) - kept :]
            for message in (Message("user", turn), Message("assistant", answer))
        ]
        return form.prompt([*messages, Message("user", question)])

    best, kept, beyond = asked(0), 0, len(turns) + 1
    if len(best) > room:
        raise ValueError(
            f"the question makes a prompt of {len(best)} tokens, and there is room for {room}: "
            "shorten it, or allow shorter answers"
        )
    # Mostly all turns fit, and are tried first; not where they are so long that only that trial would take a while.
    trial = len(turns) if sum(map(len, chain(*turns))) <= _LONG_TOKEN * room else 1
    while kept + 1 < beyond:
        prompt = asked(trial)
        if len(prompt) <= room:
            best, kept = prompt, trial
        else:
            beyond = trial
        trial = min(2 * kept + 1, (kept + beyond) // 2)
    return Prompt(tokens=tuple(best), dropped=len(turns) - kept)


def usual_length(max_seq_len: int) -> int:
    """Tokens of an answer at most where nobody says: half of the context is left to the dialogue."""
    return max(1, min(512, max_seq_len // 2))


def how_ended(finish: Finish | None) -> str:
    """What is said behind an answer's counts where it did not end by itself."""
    return {"length": "; cut off at its length", "cancelled": "; stopped"}.get(finish or "", "")
