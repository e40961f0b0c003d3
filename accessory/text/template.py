"""Hugging Face's chat templates as a form: their text as transformers renders it, cut where a model is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from accessory.text.chat import Before, Ends, Message, Segment
from accessory.text.forms import Form, MistralForm
from accessory.text.jinja import Rendered, TemplateError, render_each
from accessory.text.tokenizer import Tokenizer

# Of the characters that Unicode leaves to private use: whichever a chat does not hold becomes a mark.
_PRIVATE = [chr(code) for code in range(0xE000, 0xF8FF)]
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
# Behind these Mistral's tokenizer puts a space, whether its template wrote one or not.
_MISTRALS = re.compile(r"(<s>|</s>|\[/?INST\]|\[/?SYSTEM_PROMPT\]) ?")

Places = Sequence[tuple[int, int]] | None


class TemplateForm(Form):
    """A chat template.

    Control tokens arise where the template wrote them: what a message holds is text. Of the text a model learns what
    stands in the template's generation blocks, and where there are none each answer with the token that ends it.

    Args:
        name: where the template is from.

    Raises:
        TemplateError: it cannot even render a question.
    """

    nests = False

    def __init__(self, tokenizer: Tokenizer, template: str, name: str) -> None:
        super().__init__(tokenizer)
        self.template, self.name = template, name
        self._lead, self._end = self._probed()
        self.ends = self._found_ends()
        # Mistral's own tokenizers are known to mistral-common, whose tokens those of its templates are to be.
        self._mistral = MistralForm(tokenizer) if "[INST]" in template and not tokenizer.is_json else None
        question = [Message("user", "Q")]
        if self._mistral is None or self._as_mistral(question, True, self.text(question, ask=True)) is None:
            self._mistral = None
        else:
            self.ends = self._mistral.ends

    def segments(self, messages: Sequence[Message], *, ask: bool) -> list[Segment]:
        whole, places, guard = self._rendered(messages, ask)
        found = self._as_mistral(messages, ask, whole.text.replace(guard, ""))
        if found is not None:
            return found
        made: list[Segment] = []
        at = 0
        for begin, end, learned in [*self._answers(whole, places, messages), (len(whole.text), len(whole.text), False)]:
            how: Before = "behind" if made and made[-1].control is not None else "cont" if made else "start"
            made += self._pieces(whole.text[at:begin], how)
            made += self._pieces(whole.text[begin:end], "cont", learned)
            at = end
        return [replace(one, text=one.text.replace(guard, "")) for one in made]

    def continued(self, messages: Sequence[Message]) -> list[Segment]:
        before, last = messages[:-1], messages[-1]
        asked = self.segments(before, ask=True)
        if self._mistral is not None:
            return super().continued(messages)
        mark = _unused(messages)
        marked = replace(last, content=f"{last.text}{mark} ", given="")
        text, found, rest = self._rendered([*before, marked], False)[0].text.partition(mark)
        if not found:
            raise TemplateError("the chat template leaves out the message that is to be gone on with")
        text = text if rest.startswith(" ") else text.rstrip()
        prompt = "".join(one.text for one in asked)
        return [*asked, *self._pieces(text[len(prompt) :], "cont")] if text.startswith(prompt) else self._pieces(text)

    def unasked(self, messages: Sequence[Message]) -> list[Segment]:
        return self.segments(messages, ask=False)

    def text(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The text of a chat, as transformers renders it."""
        return render_each(self.template, [self._case(messages, ask)])[0].text

    def recorded(self) -> dict[str, Any]:
        return {"name": TEMPLATE_NAME}

    def _case(self, messages: Sequence[Message], ask: bool) -> dict[str, Any]:
        said = [
            {"role": one.role, "content": one.text, **({} if one.name is None else {"name": one.name})}
            for one in messages
        ]
        return {"messages": said, "add_generation_prompt": ask, **self.tokenizer.names}

    def _rendered(self, messages: Sequence[Message], ask: bool) -> tuple[Rendered, Places, str]:
        """The text, with a mark within each control token that was typed; where answers stand in it; the mark."""
        guard, mark = _unused(messages), _unused(messages, 1)
        guarded = [replace(one, content=self._guarded(one.text, guard), given="") for one in messages]
        answers = [one.content for one in guarded if one.role == "assistant"]
        cases = [guarded]
        if answers:
            cases.append([replace(one, content=mark) if one.role == "assistant" else one for one in guarded])
        typed = any(guard in one.content for one in guarded)
        if typed:
            cases.append(list(messages))
        whole, *others = render_each(self.template, [self._case(case, ask) for case in cases])
        if typed and others[-1].text != whole.text.replace(guard, ""):
            raise TemplateError("the chat template looks into a message that holds the name of a control token")
        return whole, _places(others[0].text.split(mark), answers, whole.text) if answers else [], guard

    def _guarded(self, text: str, guard: str) -> str:
        """A message in which no control token's name stands, nor arises with what a template puts around it."""
        while self._typed.search(text):
            text = self._typed.sub(lambda match: f"{match[0][0]}{guard}{match[0][1:]}", text)
        names = self.tokenizer.controls
        if any(text.endswith(name[:size]) for name in names for size in range(1, len(name))):
            text += guard
        if any(text.startswith(name[size:]) for name in names for size in range(1, len(name))):
            text = guard + text
        return text

    @cached_property
    def _typed(self) -> re.Pattern[str]:
        names = sorted((name for name in self.tokenizer.controls if len(name) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def _answers(self, whole: Rendered, places: Places, messages: Sequence[Message]) -> list[tuple[int, int, bool]]:
        """Begin and end of what the model writes or has written, and whether it learns that."""
        said = [one.learned and bool(one.content.strip()) for one in messages if one.role == "assistant"]
        if whole.generated:
            known = said if len(said) == len(whole.generated) else [True] * len(whole.generated)
            return [(begin, end, learned) for (begin, end), learned in zip(whole.generated, known, strict=True)]
        found = []
        for number, (begin, end) in enumerate(places or (), start=1):
            if whole.text[:begin].endswith(self._lead):
                begin -= len(self._lead)
            behind = self._end if whole.text.startswith(self._end, end) else ""
            if number == len(said) and messages[-1].role == "assistant":
                behind = whole.text[end:]
            pieces = self.tokenizer.split_controls(behind)
            while pieces and pieces[-1][1] is None and any(token is not None for _, token in pieces):
                pieces.pop()  # behind the token that ends an answer nothing is asked of the model
            found.append((begin, end + sum(len(piece) for piece, _ in pieces), said[number - 1]))
        return found

    def _pieces(self, text: str, how: Before = "start", learned: bool = False) -> list[Segment]:
        """A text as control tokens and what stands between them."""
        made = []
        for piece, token in self.tokenizer.split_controls(text):
            made.append(Segment(piece, learned, how, token))
            how = "cont" if token is None else "behind"
        return made

    def _found_ends(self) -> Ends:
        tail = ""
        for piece, token in self.tokenizer.split_controls(self._end):
            if token is not None:
                return Ends(stop_ids=(token,), lead=self._lead, tail=tail)
            tail += piece
        return Ends(lead=self._lead)

    def _as_mistral(self, messages: Sequence[Message], ask: bool, text: str) -> list[Segment] | None:
        """The segments of Mistral's own form, where it says the same but for spaces that its tokenizer makes."""
        if self._mistral is None:
            return None
        try:
            made = self._mistral.segments(messages, ask=ask)
        except ValueError:
            return None
        theirs = "".join(one.text for one in made)
        return made if _MISTRALS.sub(r"\1 ", text) == _MISTRALS.sub(r"\1 ", theirs) else None

    def _probed(self) -> tuple[str, str]:
        """What the template writes between a prompt and its answer, and what behind every answer.

        Raises TemplateError where it renders no question, with a system message or without.
        """
        mark = _PRIVATE[0]
        turns = [Message("system", "S"), Message("user", "Q"), Message("assistant", mark), Message("user", "R")]
        try:
            asked, turns = self.text(turns[1:2], ask=True), turns[1:]
        except TemplateError as error:
            try:
                asked = self.text(turns[:2], ask=True)
            except TemplateError:
                raise error from None
        try:
            said, more = self.text(turns[:-1], ask=False), self.text(turns, ask=True)
        except TemplateError:
            return "", ""  # it knows no answers
        lead = said.removeprefix(asked).partition(mark)[0] if said.startswith(asked) else ""
        last, mid = said.partition(mark)[2], more.partition(mark)[2]
        alike = (size for size in range(len(last), -1, -1) if mid.startswith(last[:size]))
        return lead, last[: next(alike)]


TEMPLATE_NAME = "chat_template.jinja"


def _unused(messages: Sequence[Message], number: int = 0) -> str:
    """A character that stands nowhere in a chat."""
    used = {character for one in messages for character in one.text if character >= _PRIVATE[0]}
    return [character for character in _PRIVATE if character not in used][number]


def _places(parts: Sequence[str], answers: Sequence[str], text: str) -> Places:
    """Where answers stand in a text that has these parts around them; None where the template changes more of them
    than the white space at their ends."""
    for trim in _TRIMS if len(parts) == len(answers) + 1 else ():
        places, made = [], parts[0]
        for answer, part in zip(map(trim, answers), parts[1:], strict=True):
            places.append((len(made), len(made) + len(answer)))
            made += answer + part
        if made == text:
            return places
    return None
