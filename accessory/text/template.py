"""Hugging Face's chat templates as a form: their text as transformers renders it, cut where a model is asked."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import islice, zip_longest
from posixpath import commonprefix
from typing import Any

from accessory.text.chat import Before, Ends, Message, Segment
from accessory.text.forms import Form, MistralForm
from accessory.text.jinja import Rendered, TemplateError, render_each
from accessory.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEMPLATE_NAME = "chat_template.jinja"
# Of the characters that Unicode leaves to private use: whichever a chat does not hold becomes a mark.
_PRIVATE = [chr(code) for code in range(0xE000, 0xF8FF)]
# What a model that reasons thinks, in datasets.
_THOUGHT = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*", re.DOTALL)
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
# Behind these Mistral's tokenizer puts a space, whether its template wrote one or not.
_MISTRALS = re.compile(r"<s>|</s>|\[/?INST\]|\[/?SYSTEM_PROMPT\]")

Places = Sequence[tuple[int, int, bool]] | None


class TemplateForm(Form):
    """A chat template.

    Control tokens arise where the template wrote them: what a message holds is text. Of the text a model learns what
    stands in the template's generation blocks, and where there are none each answer with the token that ends it.

    Args:
        name: where the template is from.

    Raises:
        TemplateError: it cannot even render a question.
    """

    reasons = True

    def __init__(self, tokenizer: Tokenizer, template: str, name: str) -> None:
        super().__init__(tokenizer)
        self.template, self.name = template, name
        self._warned = False
        self._lead, self._end, last = self._probed()
        self.ends = self._found_ends(self._end)
        self._ends_alike = bool(self.ends.stop or self.ends.stop_ids)
        if not self._ends_alike and (own := self._found_ends(self._ending(last))).stop_ids:
            self.ends = own  # the last answer ends with a token of its own, as gpt-oss's
        # Mistral's own tokenizers are known to mistral-common, whose tokens those of its templates are to be.
        self._mistral = MistralForm(tokenizer) if "[INST]" in template and not tokenizer.is_json else None
        chat = [Message("user", "Q"), Message("assistant", "A"), Message("user", "R")]
        try:
            known = self._as_mistral(chat, True, self.text(chat, ask=True))
        except TemplateError:
            known = None
        if known is None:
            self._mistral = None
        else:
            self.ends = MistralForm.ends

    def segments(self, messages: Sequence[Message], *, ask: bool) -> list[Segment]:
        return self._prefixes(messages, [(len(messages), ask)])[0]

    def parts(self, messages: Sequence[Message]) -> list[list[Segment]]:
        apart = [_thought_apart(one) for one in messages]
        if apart != [*messages]:
            with suppress(ValueError):  # of a template without a place for reasoning, where it is part of the answer
                return self._parts(apart)
        return self._parts(messages)

    def _parts(self, messages: Sequence[Message]) -> list[list[Segment]]:
        for stop in self.ends.stop:
            if any(one.taught and stop in one.content for one in messages):
                raise ValueError(f"its answer holds {stop!r}, at which answers end in this chat template")
        parts = super().parts(messages)
        if _reasoned(messages):  # then each answer is an example of its own
            for one, part in zip((one for one in messages if one.taught), parts, strict=True):
                if _squeezed(one.reasoning) not in _squeezed("".join(two.text for two in part if two.learned)):
                    raise ValueError(f"the chat template {self.name} leaves out the reasoning of its answer")
        self._say_what_is_left_out(messages, parts)
        # Where a template writes nothing at which the model could end, the end token does.
        return parts if self._ends_answers else [[*part, self._eos(learned=True)] for part in parts]

    def _say_what_is_left_out(self, messages: Sequence[Message], parts: Sequence[Sequence[Segment]]) -> None:
        """Warn, once, of what the system says and the template does not."""
        for one in messages if parts and not self._warned else ():
            written = _squeezed("".join(two.text for two in parts[-1]))
            if one.role == "system" and _squeezed(one.content) not in written:
                logger.warning("the chat template %s leaves out what the system says: it is not trained", self.name)
                self._warned = True

    @property
    def _ends_answers(self) -> bool:
        return self._mistral is not None or bool(self.ends.stop or self.ends.stop_ids)

    def _prefixes(self, messages: Sequence[Message], cuts: Sequence[tuple[int, bool]]) -> list[list[Segment]]:
        guard, rendered = self._rendered(messages, cuts)
        made = []
        for (count, ask), (whole, places) in zip(cuts, rendered, strict=True):
            plain = whole.text.replace(guard, "")
            found = self._as_mistral(messages[:count], ask, plain)
            made.append(self._cut(messages[:count], whole, places, guard) if found is None else found)
        return made

    def _nests(self, messages: Sequence[Message]) -> bool:
        return False

    def _joins(self, messages: Sequence[Message]) -> bool:
        # Else each answer is an example, which ends as the last one does, or with the end token. Of earlier answers
        # most templates leave out the reasoning.
        return (self._mistral is not None or self._ends_alike) and not _reasoned(messages)

    def _cut(self, messages: Sequence[Message], whole: Rendered, places: Places, guard: str) -> list[Segment]:
        """A text in segments, of which answers with their ends are some."""
        made: list[Segment] = []
        at = 0
        for begin, end, learned in [*self._answers(whole, places, messages), (len(whole.text), len(whole.text), False)]:
            how: Before = "behind" if made and made[-1].control is not None else "cont" if made else "start"
            made += self._pieces(whole.text[at:begin], how)
            answer = self._pieces(whole.text[begin:end], "cont", learned)
            if answer and self._mistral is not None and not answer[0].text.startswith(" "):
                answer[0] = replace(answer[0], text=f" {answer[0].text}")  # as in the chats that its own form knows
            made += answer
            at = end
        return [replace(one, text=one.text.replace(guard, "")) for one in made]

    def _begun(self, messages: Sequence[Message]) -> list[Segment]:
        if self._mistral is not None:
            return super()._begun(messages)
        *before, last = messages
        mark = _unused(messages)
        marked = [*before, replace(last, content=f"{last.text}{mark} ", given="")]
        guard, [(whole, _)] = self._rendered(marked, [(len(marked), False)])
        text, found, rest = whole.text.rpartition(mark)
        if not found:
            raise TemplateError("the chat template leaves out the message that is to be gone on with")
        text = text if rest.startswith(" ") else text.rstrip()  # as transformers has it
        plain, prompt = text.replace(guard, ""), self.text(before, ask=True)
        if not plain.startswith(prompt) and not prompt.startswith(plain):  # the latter where nothing was said yet
            raise TemplateError("the chat template asks a question otherwise than it writes the question's answer")
        begun: list[Segment] = []
        left = len(prompt)
        for one in self._pieces(text):
            said = one.text.replace(guard, "")
            left, said = max(left - len(said), 0), said[left:]
            if said:
                begun.append(replace(one, text=said, how=one.how if begun else "cont"))
        return begun

    def unasked(self, messages: Sequence[Message]) -> list[Segment]:
        return self.segments(messages, ask=False)

    def text(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The text of a chat, as transformers renders it."""
        return render_each(self.template, [self._case(messages, ask)])[0].text

    def recorded(self) -> dict[str, Any]:
        return {"name": TEMPLATE_NAME}

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    def _case(self, messages: Sequence[Message], ask: bool) -> dict[str, Any]:
        said = [
            {
                "role": one.role,
                "content": one.text,
                **({} if one.name is None else {"name": one.name}),
                **({"reasoning_content": one.reasoning} if one.reasoning else {}),
            }
            for one in messages
        ]
        return {"messages": said, "add_generation_prompt": ask, **self.tokenizer.names}

    def _rendered(
        self, messages: Sequence[Message], cuts: Sequence[tuple[int, bool]]
    ) -> tuple[str, list[tuple[Rendered, Places]]]:
        """The texts of a chat's first messages, and where the answers stand in each.

        Within a control token's name that was typed there is a mark, which is returned as well.
        """
        guard, mark = _unused(messages), _unused(messages, 1)
        guarded = [
            replace(
                one,
                content=self._guarded(one.text, guard),
                name=self._guarded(one.name or "", guard) or None,
                given="",
                reasoning=self._guarded(one.reasoning, guard),
            )
            for one in messages
        ]
        marked = [replace(one, content=mark) if _answers(one) else one for one in guarded]
        typed = any(guard in f"{one.name}{one.content}{one.reasoning}" for one in guarded)
        lists = [guarded, marked, *([messages] if typed else [])]
        # What the model says before its last answer begins where the question ends.
        reasons = [not ask and _reasoned(messages[count - 1 : count]) for count, ask in cuts]
        cases = []
        for (count, ask), reasoned in zip(cuts, reasons, strict=True):
            cases += [self._case(one[:count], ask) for one in lists]
            cases += [self._case(guarded[: count - 1], True)] if reasoned else []
        texts = iter(render_each(self.template, cases))
        found = []
        for (count, _), reasoned in zip(cuts, reasons, strict=True):
            whole, parts = next(texts), next(texts).text.split(mark)
            if typed and next(texts).text != whole.text.replace(guard, ""):
                raise TemplateError("the chat template looks into a message that holds the name of a control token")
            answers = [one.content for one in guarded[:count] if _answers(one)]
            places = self._places(parts, answers, whole.text) if answers else []
            found.append((whole, _with_reasoning(places, whole.text, next(texts).text) if reasoned else places))
        return guard, found

    def _guarded(self, text: str, guard: str) -> str:
        """A message in which no control token's name stands, nor arises with what a template puts around it."""
        while self._typed.search(text):
            text = self._typed.sub(lambda match: f"{match[0][0]}{guard}{match[0][1:]}", text)
        body = text.strip()  # as a template may have it
        begin = text.find(body)
        starts, ends, sizes = self._halves
        before = guard if any(body[:size] in ends for size in sizes) else ""
        behind = guard if any(body[-size:] in starts for size in sizes) else ""
        return f"{text[:begin]}{before}{body}{behind}{text[begin + len(body) :]}"

    @cached_property
    def _typed(self) -> re.Pattern[str]:
        names = sorted((name for name in self.tokenizer.controls if len(name) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    @cached_property
    def _halves(self) -> tuple[set[str], set[str], range]:
        """How the names of control tokens begin and end, and the lengths that this has."""
        cut = [(name[:at], name[at:]) for name in self.tokenizer.controls for at in range(1, len(name))]
        return {start for start, _ in cut}, {end for _, end in cut}, range(1, max(map(len, self.tokenizer.controls)))

    def _answers(self, whole: Rendered, places: Places, messages: Sequence[Message]) -> list[tuple[int, int, bool]]:
        """Begin and end of what the model writes or has written, and whether it learns that."""
        if whole.generated:
            said = [one for one in messages if one.role == "assistant"]
            known = [one.taught for one in said]
            if len(said) != len(whole.generated):  # so no block is an answer's for certain
                known = [all(one.learned for one in said)] * len(whole.generated)
            return [(begin, end, learned) for (begin, end), learned in zip(whole.generated, known, strict=True)]
        found = []
        for one, (begin, end, kept) in zip(filter(_answers, messages), places or (), strict=False):
            behind = whole.text[end:] if one is messages[-1] else self._end
            end += len(self._ending(behind)) if whole.text.startswith(behind, end) else 0
            found.append((begin, end, one.taught and kept))
        return found

    def _ending(self, text: str) -> str:
        """What of the text behind an answer is the model's to say: up to the first control token, else all."""
        pieces = self.tokenizer.split_controls(text)
        count = next((count for count, (_, token) in enumerate(pieces, start=1) if token is not None), len(pieces))
        return "".join(piece for piece, _ in pieces[:count])

    def _places(self, parts: Sequence[str], answers: Sequence[str], text: str) -> Places:
        """Where answers, with what the template writes before each, stand in a text that has these parts around them.

        And whether they are whole. None where that is not known: one that a template changes, but for white space at
        its ends, is found where what follows has a control token.
        """
        parts = [*(part.removesuffix(self._lead) for part in parts[:-1]), parts[-1]]
        if len(parts) != len(answers) + 1 or not text.startswith(parts[0]):
            return None
        places = []
        at = len(parts[0])
        for answer, part in zip(answers, parts[1:], strict=True):
            known = (f"{lead}{trim(answer)}" for lead in (self._lead, "") for trim in _TRIMS)
            ends = (at + len(said) for said in known if text.startswith(said + part, at))
            end = next(ends, text.find(part, at) if self._typed.search(part) else -1)
            if end < 0:
                return None
            places.append((at, end, _squeezed(answer) in _squeezed(text[at:end])))
            at = end + len(part)
        return places if at == len(text) else None

    def _pieces(self, text: str, how: Before = "start", learned: bool = False) -> list[Segment]:
        """A text as control tokens and what stands between them."""
        made = []
        for piece, token in self.tokenizer.split_controls(text):
            made.append(Segment(piece, learned, how, token))
            how = "cont" if token is None else "behind"
        return made

    def _found_ends(self, end: str) -> Ends:
        *before, (_last, token) = self.tokenizer.split_controls(end) or [("", None)]
        if token is not None:
            return Ends(stop_ids=(token,), lead=self._lead, tail="".join(piece for piece, _ in before))
        stop = end.rstrip()
        return Ends(stop=(stop,), lead=self._lead) if stop else Ends(lead=self._lead, tail=end)

    def _as_mistral(self, messages: Sequence[Message], ask: bool, text: str) -> list[Segment] | None:
        """The segments of Mistral's own form, where it says the same but for spaces that its tokenizer makes."""
        if self._mistral is None:
            return None
        for trim in _TRIMS:
            said = [replace(one, content=trim(one.content)) if one.role == "assistant" else one for one in messages]
            try:
                made = self._mistral.segments(said, ask=ask)
            except ValueError:
                return None
            written = ["".join(one.text for one in made), text]
            if any(one.content.endswith(" ") for one in said):  # the form may leave such a space out
                written = [re.sub(" +</s>", "</s>", one) for one in written]
            pairs = zip_longest(*map(_MISTRALS.split, written))
            if all(our in (other, f" {other}") or (our, other) == ("", " ") for our, other in pairs):
                return made
        return None

    def _probed(self) -> tuple[str, str, str]:
        """What the template writes between a prompt and its answer, what behind every answer, and what behind the last.

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
            return "", "", ""  # it knows no answers
        lead = said.removeprefix(asked).partition(mark)[0] if said.startswith(asked) else ""
        last, mid = said.partition(mark)[2], more.partition(mark)[2]
        end = ""
        for (piece, token), (other, same) in zip(*map(self.tokenizer.split_controls, (last, mid)), strict=False):
            end += commonprefix([piece, other]) if token == same else ""
            if token is not None or piece != other:
                break
        return lead, end, last


def _unused(messages: Sequence[Message], number: int = 0) -> str:
    """A character that stands nowhere in a chat."""
    texts = (f"{one.name}{one.text}{one.reasoning}" for one in messages)
    used = {character for text in texts for character in text if character >= _PRIVATE[0]}
    for character in islice((one for one in _PRIVATE if one not in used), number, None):
        return character
    raise TemplateError("a chat that holds all of Unicode's private characters is not put into a chat template")


def _with_reasoning(places: Places, text: str, asked: str) -> Places:
    """Where the answers stand in a text, the last one from the end of the prompt that asks for it."""
    if not places or not text.startswith(asked):
        return places
    *before, (_, end, whole) = places
    return [*before, (len(asked), end, whole)]


def _reasoned(messages: Sequence[Message]) -> bool:
    """Whether one of the answers has reasoning, be it within its content, where many templates look for it."""
    return any(one.taught and (one.reasoning or "</think>" in one.content) for one in messages)


def _thought_apart(message: Message) -> Message:
    """The message with the reasoning that stands at the head of its content as such."""
    found = None if message.reasoning else _THOUGHT.match(message.content)
    answer = "" if found is None else message.content[found.end() :]
    return replace(message, reasoning=found[1], content=answer) if found is not None and answer else message


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _answers(message: Message) -> bool:
    return message.role == "assistant" and bool(message.content.strip())
