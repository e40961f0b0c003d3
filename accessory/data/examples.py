"""From a record to the token ids that a model is trained on, and to those among them that it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accessory.data.records import Instruction, OtherShape, Talk, Text, read_said
from accessory.data.sources import Source
from accessory.errors import shown
from accessory.text.chat import Segment, encode_example
from accessory.text.forms import AlpacaForm, DefaultForm, Form, raw_segments
from accessory.text.instruction import TAKES_INPUT
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

    def read(self, value: Any, source: Source) -> tuple[list[list[Segment]], Form | None]:
        """A record's examples as segments, none where it says nothing that is learned; and the form they have.

        Raises:
            ValueError: the reason, without file or line.
        """
        said = read_said(value, ignore=self.ignore)
        cut = source.preprocess == "single_turn_llava" and not self.dialog
        if cut and not isinstance(said, Talk):
            cure = "leave preprocess: single_turn_llava out of the yaml"
            raise OtherShape(f"single_turn_llava needs a dialogue, and it is {shown(value)}", cure)
        if self.dialog and isinstance(said, Instruction):
            raise OtherShape("it has no dialogue: an Alpaca record is read without --dialog", "leave --dialog out")
        if isinstance(said, Text):
            return raw_segments(self.tokenizer, said.prompt, said.completion), None
        messages = said.messages
        if cut:  # behind the first answer
            answers = (place for place, message in enumerate(messages) if message.role == "assistant")
            messages = messages[: next(answers, -1) + 1]
        form, instructs = self.form, cut or isinstance(said, Instruction)
        if form is None or (instructs and isinstance(form, AlpacaForm)):
            name = source.prompt_type if instructs else DefaultForm.name
            if name not in self._made:
                self._made[name] = AlpacaForm(self.tokenizer, (name,)) if instructs else DefaultForm(self.tokenizer)
            form = self._made[name]
        return form.parts(messages), form

    def leaves_input_out(self, value: Any, form: Form | None) -> bool:
        """Whether a record that `read` put into the form has an "input" that stands nowhere in it."""
        takes_none = isinstance(form, AlpacaForm) and form.prompt_types[0] != TAKES_INPUT
        return takes_none and "input" not in self.ignore and bool((value.get("input") or "").strip())

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
