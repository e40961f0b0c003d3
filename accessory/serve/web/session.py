"""What the server keeps for one open tab."""

from typing import Any, Self

from accessory.serve.dialogue import Turn
from accessory.serve.web.answering import Answer, Answering


class Session:
    """A tab's dialogue, its last answer, and the one that is being written.

    Attributes:
        turns: of the dialogue, in order; the single-turn page has none.
        answer: the last one, for the page's tab of experts.
        preparing: a question is being made a prompt.
        running: the request whose answer is being written.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.answer: Answer | None = None
        self.preparing = False
        self.running: Answering | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return self.preparing or self.running is not None

    def stop(self) -> None:
        """End the answer that is being written, if there is one."""
        if self.running is not None:
            self.running.stop()

    def __deepcopy__(self, memory: dict[int, Any]) -> Self:
        """Gradio copies a page's initial state for every tab, and each begins afresh."""
        return type(self)()
