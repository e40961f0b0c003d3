"""The text of a conversation of several turns, in the form that Vicuna v1 introduced.

A finetuned model answers well only to the text that it was trained on, so none of these strings may change,
not by a space: tests/test_prompts.py holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_SEPARATOR = "###"


@dataclass
class Conversation:
    """Questions and answers, and the text that they make.

    `system` is the sentence at the beginning; `human` and `assistant` are the names of the two. Load the
    turns, then ask for the text:

        conversation = default_conversation()
        conversation.load_qas([["What is 2 + 2?", "4."], ["And 3 + 3?", None]])
        prompt = conversation.get_prompt()   # ends with " Assistant:", for the model to go on
    """

    system: str = _SYSTEM
    human: str = "Human"
    assistant: str = "Assistant"
    _turns: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def response_end_signal(self) -> str:
        """What stands after every answer: the stop string of a generation."""
        return "\n" + _SEPARATOR

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
        return "".join(text for text, _ in self._parts())

    def answer_spans(self) -> list[tuple[int, int]]:
        """Where the answers stand in get_prompt(), each with its end signal: what a model learns from it.

        Begin and end of each in characters, the end excluded. An open answer has none.
        """
        spans = []
        at = 0
        for text, learned in self._parts():
            if learned:
                spans.append((at, at + len(text)))
            at += len(text)
        return spans

    def _parts(self) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is an answer."""
        end = self.response_end_signal
        parts = [(f"{self.system}\n{end}", False)]
        for question, answer in self._turns:
            parts.append((f" {self.human}: {question}{end} {self.assistant}:", False))
            if answer is not None:
                parts += [(" ", False), (f"{answer}{end}", True)]
        return parts


def default_conversation() -> Conversation:
    """A new conversation without turns, in the form that the demos and the finetuning data use."""
    return Conversation()
