"""From a record to the token ids that a model is trained on, and to those among them that it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accessory.data.records import Instruction, Talk, Text, read_said
from accessory.data.sources import Source
from accessory.errors import shown
from accessory.text.chat import Message, Segment, encode_example
from accessory.text.forms import AlpacaForm, DefaultForm, Form, raw_segments
from accessory.text.tokenizer import Tokenizer

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How records become examples.

    Attributes:
        dialog: dialogues are read, and no Alpaca records.
        max_words: the most tokens of an example.
        form: of all chats and instructions; None: dialogues have the default form, Alpaca records their source's.
        ignore: fields that are passed over.
    """

    tokenizer: Tokenizer
    max_words: int
    dialog: bool = False
    form: Form | None = None
    seed: int = 0
    ignore: frozenset[str] = frozenset()
    _made: dict[str, Form] = field(default_factory=dict, compare=False)

    def _form_of(self, said: Talk | Instruction, source: Source) -> Form:
        if self.form is not None and not (isinstance(said, Instruction) and isinstance(self.form, AlpacaForm)):
            return self.form
        name = DefaultForm.name if isinstance(said, Talk) else source.prompt_type
        if name not in self._made:
            made = DefaultForm(self.tokenizer) if isinstance(said, Talk) else AlpacaForm(self.tokenizer, (name,))
            self._made[name] = made
        return self._made[name]

    def read(self, value: Any, source: Source) -> tuple[list[list[Segment]], Form | None]:
        """A record's examples as segments, none where it says nothing that is learned; and the form they have.

        Raises:
            ValueError: the reason, without file or line.
        """
        if source.preprocess == "single_turn_llava" and not self.dialog:
            value = _first_turn(value)
        said = read_said(value, ignore=self.ignore)
        if self.dialog and isinstance(said, Instruction):
            raise ValueError("it has no dialogue: an Alpaca record is read without --dialog")
        if isinstance(said, Text):
            return raw_segments(self.tokenizer, said.prompt, said.completion), None
        form = self._form_of(said, source)
        return form.parts(_messages(said)), form

    def encode(self, segments: Sequence[Segment]) -> tuple[Ids, Ids, bool]:
        """Token ids and labels, of equal length, at most `max_words`; and whether they were cut there, on the right.

        A label is its id where the token is learned and 0 elsewhere: id 0 itself is never learned.

        Raises:
            ValueError: a learned text would not come back from its tokens.
        """
        example = encode_example(segments, self.tokenizer)
        tokens = np.array(example.tokens, dtype=np.int64)
        labels = np.where(np.array(example.learned, dtype=bool), tokens, 0)
        return tokens[: self.max_words], labels[: self.max_words], len(tokens) > self.max_words


def _messages(said: Talk | Instruction) -> Sequence[Message]:
    if isinstance(said, Talk):
        return said.messages
    messages = [] if said.system is None else [Message("system", said.system)]
    for question, answer in said.history:
        messages += [Message("user", question), Message("assistant", answer, learned=not said.only_last)]
    return [*messages, Message("user", said.instruction, given=said.given), Message("assistant", said.output)]


def _first_turn(record: Any) -> Any:
    """An Alpaca record of a dialogue's first question and answer."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        raise ValueError(f"single_turn_llava needs two or more turns under 'conversations', and it is {shown(record)}")
    if record.get("image"):
        raise ValueError("it has an image, and only text can be trained on")
    for number, turn in enumerate(turns[:2], start=1):
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number} of its conversations has no string under 'value', and it is {shown(turn)}")
    return {"instruction": turns[0]["value"], "output": turns[1]["value"]}
