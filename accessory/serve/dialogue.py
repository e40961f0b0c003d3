"""A dialogue with a model: the turns so far, and the prompt that they make within the model's context."""

from collections.abc import Sequence
from dataclasses import dataclass

from accessory.data.conversation import default_conversation
from accessory.model.tokenizer import Tokenizer

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model reads to answer a question.

    Attributes:
        tokens: begins with the beginning-of-sequence token.
        stop: the text that ends the answer.
        dropped: turns, the oldest ones, for which there was no room.
    """

    tokens: tuple[int, ...]
    stop: str
    dropped: int = 0


def dialogue_prompt(tokenizer: Tokenizer, turns: Sequence[Turn], question: str, *, room: int) -> Prompt:
    """The prompt for a question that follows ``turns``, without as many of the oldest as leave it too long.

    Args:
        room: tokens of the prompt at most.

    Raises:
        ValueError: the question is empty, or too long by itself.
    """
    if not question.strip():
        raise ValueError("the question is empty: write one")
    conversation = default_conversation()
    tokens: list[int] = []
    for dropped in range(len(turns) + 1):
        conversation.load_qas([*turns[dropped:], (question, None)])
        tokens = tokenizer.encode(conversation.get_prompt(), bos=True, eos=False)
        if len(tokens) <= room:
            return Prompt(tokens=tuple(tokens), stop=conversation.response_end_signal, dropped=dropped)
    raise ValueError(
        f"the question makes a prompt of {len(tokens)} tokens, and there is room for {room}: "
        "shorten it, or allow shorter answers"
    )
