"""A dialogue with a model: the turns so far, and the prompt that they make within the model's context."""

from collections.abc import Sequence
from dataclasses import dataclass

from accessory.data.chat_templates import Message, chat_prompt
from accessory.model.tokenizer import Tokenizer
from accessory.serve.request import Finish

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model reads to answer a question.

    Attributes:
        tokens: begins with the beginning-of-sequence token.
        stop: texts that end the answer.
        dropped: turns, the oldest ones, for which there was no room.
    """

    tokens: tuple[int, ...]
    stop: tuple[str, ...]
    dropped: int = 0


def dialogue_prompt(
    tokenizer: Tokenizer, turns: Sequence[Turn], question: str, *, room: int, template: str = "default"
) -> Prompt:
    """The prompt for a question that follows ``turns``, without as many of the oldest as leave it too long.

    Args:
        room: tokens of the prompt at most.
        template: a name of `accessory.data.chat_templates`.

    Raises:
        ValueError: the question is empty, or too long by itself, or the template is unknown.
    """
    if not question.strip():
        raise ValueError("the question is empty: write one")
    length = 0
    for dropped in range(len(turns) + 1):
        messages = [
            message
            for asked, answer in turns[dropped:]
            for message in (Message("user", asked), Message("assistant", answer))
        ]
        prompt = chat_prompt(template, [*messages, Message("user", question)], tokenizer)
        length = len(prompt.tokens)
        if length <= room:
            return Prompt(tokens=tuple(prompt.tokens), stop=prompt.stop, dropped=dropped)
    raise ValueError(
        f"the question makes a prompt of {length} tokens, and there is room for {room}: "
        "shorten it, or allow shorter answers"
    )


def usual_length(max_seq_len: int) -> int:
    """Tokens of an answer at most where nobody says: half of the context is left to the dialogue."""
    return max(1, min(512, max_seq_len // 2))


def how_ended(finish: Finish | None) -> str:
    """What is said behind an answer's counts where it did not end by itself."""
    return {"length": "; cut off at its length", "cancelled": "; stopped"}.get(finish or "", "")
