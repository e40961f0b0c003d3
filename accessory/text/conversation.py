"""The text of a dialogue in the form that Vicuna v1 introduced, as users' programs build it.

A finetuned model answers well only to the text that it was trained on, so none of these strings may change,
not by a space: tests/test_prompts.py holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
END = "\n###"
HUMAN, ASSISTANT = " Human:", " Assistant:"


@dataclass
class Conversation:
    """Questions and answers, and the text that they make.

    `system` is the sentence at the beginning. Load the turns, then ask for the text:

        conversation = default_conversation()
        conversation.load_qas([["What is 2 + 2?", "4."], ["And 3 + 3?", None]])
        prompt = conversation.get_prompt()   # ends with " Assistant:", for the model to go on
    """

    system: str = SYSTEM
    _turns: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def response_end_signal(self) -> str:
        """What stands after every answer: the stop string of a generation."""
        return END

    def load_qas(self, qas: Sequence[Sequence[str | None]]) -> None:
        """Take `qas`, pairs of a question and its answer, in place of what was loaded before.

        The last answer may be None: it is the one to be generated. Raises ValueError for anything else.
        """
        if isinstance(qas, str) or not all(not isinstance(pair, str) and len(pair) == 2 for pair in qas):
            raise ValueError(f"load_qas takes pairs [question, answer or None], not {qas!r}")
        turns: list[tuple[str, str | None]] = []
        for number, (question, answer) in enumerate(qas, start=1):
            if not isinstance(question, str):
                raise ValueError(f"the question of turn {number} is {question!r}: give a string")
            if not isinstance(answer, str) and (answer is not None or number < len(qas)):
                raise ValueError(
                    f"the answer of turn {number} is {answer!r}: give a string (or None, in the last turn)"
                )
            turns.append((question, answer))
        self._turns = turns

    def get_prompt(self) -> str:
        """The whole text. Where the last answer is None it ends with the assistant's name and a colon."""
        turns = (
            f"{HUMAN} {question}{END}{ASSISTANT}" + ("" if answer is None else f" {answer}{END}")
            for question, answer in self._turns
        )
        return f"{self.system}\n{END}{''.join(turns)}"


def default_conversation() -> Conversation:
    """A new conversation without turns, in the form that the demos and the finetuning data use."""
    return Conversation()
