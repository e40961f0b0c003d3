"""The forms in which a chat is put to a model: the one home of "which tokens does this chat become".

A finetuned model answers well only to the text that it was trained on, so training and asking go through the same
`segments`. tests/test_forms.py holds that, and the forms to other programs' encodings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from posixpath import commonprefix
from typing import Any

from accessory.text.chat import Before, Ends, Message, Segment, encode_example, ids_of
from accessory.text.conversation import ASSISTANT, END, HUMAN, SYSTEM
from accessory.text.instruction import PROMPT_NAMES, instruction_prompt
from accessory.text.jinja import TemplateError
from accessory.text.tokenizer import Tokenizer

_SHORT = 40  # characters at the end of a prompt that an error shows


class Form:
    """How chats are put to the model of a tokenizer.

    Attributes:
        name: as --chat_template takes it.
        ends: where an answer ends, and what of the model's text is not the answer's.
        assumed: nothing is known of how the model was trained, and this is as good a guess as any.
        of_single_questions: it is made of records that have no earlier turns, so that a model may take these amiss.
        reasons: it has a place for what an assistant thinks before its answer.
    """

    name: str
    ends: Ends = Ends()
    assumed = of_single_questions = reasons = False
    asks = ""  # with which a prompt ends that a model is to answer

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._tried = False

    def segments(self, messages: Sequence[Message], *, ask: bool) -> list[Segment]:
        """The text of a chat in segments; answers with their ends are `learned` where the message is.

        Args:
            ask: the last message is the user's, and the text ends where the model is to answer it.

        Raises:
            ValueError: the form cannot say these messages.
        """
        raise NotImplementedError

    def continued(self, messages: Sequence[Message]) -> list[Segment]:
        """The text of a chat whose last message, the assistant's, is to be gone on with."""
        if not messages or messages[-1].role != "assistant":
            raise ValueError("the last message, which is to be gone on with, must be from the assistant")
        return [*self.segments(messages[:-1], ask=True), *self._begun(messages)]

    def _begun(self, messages: Sequence[Message]) -> list[Segment]:
        """What stands behind the prompt of a last message that is to be gone on with."""
        content = messages[-1].content
        return [Segment(self.ends.lead + content)] if content else []

    def unasked(self, messages: Sequence[Message]) -> list[Segment]:
        """The text of a chat without that which asks for an answer."""
        *before, last = self.segments(messages, ask=bool(messages) and messages[-1].role == "user")
        return [*before, Segment(last.text.removesuffix(self.asks), False, last.how, last.control)]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which a model answers the last message; ValueError as above."""
        return ids_of(self.segments(messages, ask=True), self.tokenizer)

    def parts(self, messages: Sequence[Message]) -> list[list[Segment]]:
        """What training makes of a chat: one example, or one for each answer; none where nothing is learned.

        The latter where a prompt does not begin with the one before and its answer, as where a form puts what the
        system says into the last question: so each answer is learned behind what it will be asked with.

        Raises:
            ValueError: as above.
        """
        messages = _answered(messages)
        places = [place for place, message in enumerate(messages) if message.taught]
        if not places:
            return []
        if not self.reasons and any(messages[place].reasoning for place in places):
            why = f'its answer has reasoning, for which the form "{self.name}" has no place'
            raise ValueError(f"{why}: ignore that field, or take the chat template of a model that reasons")
        self._refuse_changing_tokenizer()
        if self._nests(messages):
            return [self.segments(messages, ask=False)]
        whole, *prompts = self._prefixes(messages, [(len(messages), False), *((place, True) for place in places)])
        if self._joins(messages) and _teaches(prompts, whole):
            return [whole]
        wholes = self._prefixes(messages, [(place + 1, False) for place in places])
        for asked, part in zip(prompts, wholes, strict=True):
            if not _teaches([asked], part):
                raise ValueError(_why_not(asked, part))
        return [
            [*(one.unlearned for one in part[: len(asked)]), *part[len(asked) :]]
            for asked, part in zip(prompts, wholes, strict=True)
        ]

    def ends_answers(self) -> bool:
        """Whether something is learned behind the words of an answer, by which a model knows when to stop."""
        word = "a"
        try:
            (part,) = self.parts([Message("user", word), Message("assistant", word)])
        except ValueError:  # which the records meet as well, or the template asks for other messages
            return True
        return not "".join(one.text for one in part if one.learned).rstrip().endswith(word)

    def _prefixes(self, messages: Sequence[Message], cuts: Sequence[tuple[int, bool]]) -> list[list[Segment]]:
        """The segments of a chat's first so many messages, each with whether they ask."""
        return [self.segments(messages[:count], ask=ask) for count, ask in cuts]

    def _nests(self, messages: Sequence[Message]) -> bool:
        """Whether the chat is known to begin with the prompts of its earlier questions."""
        return True

    def _joins(self, messages: Sequence[Message]) -> bool:
        """Whether several answers may be learned in one example."""
        return True

    def _refuse_changing_tokenizer(self) -> None:
        """Raise ValueError, once for all records, where the tokenizer would not give the form's own text back."""
        if not self._tried:
            known = (one for one in "aAe0" if self.tokenizer.decode(self.tokenizer.cont(one)) == one)
            word = next(known, "a")
            try:
                chat = self.segments([Message("user", word), Message("assistant", word)], ask=False)
                encode_example(chat, self.tokenizer)
            except TemplateError:  # the template asks for other messages
                pass
            except ValueError as error:
                reason = f"the tokenizer {self.tokenizer.path} changes the texts that it reads"
                raise ValueError(f'{reason}, so the form "{self.name}" cannot be learned with it') from error
            self._tried = True

    def recorded(self) -> dict[str, Any]:
        """What meta.json says of a model that was trained in this form."""
        return {"name": self.name}

    @property
    def digest(self) -> str:
        """By which a form is known again."""
        return json.dumps(self.recorded())

    def _control(self, token: int, learned: bool = False) -> Segment:
        return Segment(self.tokenizer.name(token), learned, control=token)

    def _begin(self) -> list[Segment]:
        return begin_of(self.tokenizer)

    def _eos(self, learned: bool = False) -> Segment:
        return self._control(self.tokenizer.eos_id, learned)


def _teaches(prompts: Sequence[Sequence[Segment]], whole: Sequence[Segment]) -> bool:
    """Whether a chat begins with each of these prompts, and something is learned behind each."""
    keys = [(one.text, one.how, one.control) for one in whole]
    end = len(whole)
    for asked in reversed(prompts):
        begin = len(asked)
        if keys[:begin] != [(one.text, one.how, one.control) for one in asked]:
            return False
        if not any(one.learned for one in whole[begin:end]):
            return False
        end = begin
    return True


def _why_not(asked: Sequence[Segment], part: Sequence[Segment]) -> str:
    """Why an answer is not learned, which does not stand behind the prompt that asks for it, or is not whole there."""
    prompt, written = ("".join(one.text for one in segments) for segments in (asked, part))
    missing = prompt[len(commonprefix([prompt, written])) :]
    if 0 < len(missing) <= _SHORT:
        why = f"the chat template asks for an answer with {missing!r}, and does not write that before this one"
        return f"{why}: where a model is to reason there, give the answer its reasoning_content; or take another form"
    return "the chat template changes an answer, or writes it otherwise than it asks for it"


def _answered(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages up to the last answer that says something: behind it nothing can be learned."""
    said = [place for place, message in enumerate(messages) if message.role == "assistant" and message.content.strip()]
    return messages[: said[-1] + 1] if said else ()


class _Turns(Form):
    """A form of questions and answers in turn, with what the system says at the beginning."""

    def segments(self, messages: Sequence[Message], *, ask: bool) -> list[Segment]:
        system, turns = _sorted(messages)
        if ask and (not turns or turns[-1].role != "user"):
            raise ValueError("the first message (behind the system's) and the last must be from the user")
        return self._said(system, turns)

    def _said(self, system: str | None, turns: Sequence[Message]) -> list[Segment]:
        raise NotImplementedError


def _sorted(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """What the system says, and the others' messages in turn; several of one role in a row are one.

    Raises:
        ValueError: there are none, a system message stands behind another, or the first of the rest is not the user's.
    """
    merged = [_merged(list(run)) for _, run in groupby(messages, key=lambda message: message.role)]
    system = merged.pop(0).content if merged and merged[0].role == "system" else None
    if any(message.role == "system" for message in merged):
        raise ValueError("a system message must stand before all others")
    if not merged or merged[0].role != "user":
        raise ValueError("the first message (behind the system's) and the last must be from the user")
    return system, merged


def _merged(run: list[Message]) -> Message:
    if len(run) == 1:
        return run[0]
    learned = all(message.learned for message in run)
    return Message(run[0].role, "\n\n".join(message.text for message in run if message.text), learned=learned)


class DefaultForm(_Turns):
    """Vicuna v1's form. What the system says takes the place of its opening sentence.

    Questions are stripped, answers at their end.

    Args:
        learns_end: the model has learned what follows "\\n###", so that this may stand in an answer as a heading.
    """

    name = "default"
    asks = ASSISTANT

    def __init__(self, tokenizer: Tokenizer, *, learns_end: bool = True) -> None:
        super().__init__(tokenizer)
        self.learns_end = learns_end
        self.assumed = not learns_end
        self.ends = Ends(stop=(END + HUMAN,), lead=" ", tail=END) if learns_end else Ends(stop=(END,), lead=" ")

    def _said(self, system: str | None, turns: Sequence[Message]) -> list[Segment]:
        made = self._begin()
        text = f"{SYSTEM if system is None else system}\n{END}{HUMAN}"
        how: Before = "start"
        for number, turn in enumerate(turns, start=1):
            if turn.role == "user":
                made.append(Segment(f"{text} {turn.text.strip()}{END}{ASSISTANT}", how=how))
                continue
            answer = turn.content.rstrip()
            if turn.learned and END + HUMAN in answer:
                raise ValueError(f"its answer holds {END + HUMAN!r}, at which answers end in this form")
            learned, last = turn.taught, number == len(turns)
            made.append(Segment(f" {answer}{END}{'' if last else HUMAN}", learned))
            text, how = "", "cont"
            if last:
                made.append(self._eos(learned))
        return made

    def recorded(self) -> dict[str, Any]:
        return {"name": self.name, **({"answers_end_at": END + HUMAN} if self.learns_end else {})}


class AlpacaForm(_Turns):
    """The prompt of an instruction, and the answer directly behind it. Earlier turns stand before as whole examples.

    What the system says takes the place of the opening sentence. Instructions are stripped, but where they are the
    whole prompt (of type None), and nothing else is.
    """

    name = "alpaca"
    of_single_questions = True
    asks = "\n\n### Response:"

    def __init__(self, tokenizer: Tokenizer, prompt_types: Sequence[str] = ("alpaca",)) -> None:
        super().__init__(tokenizer)
        if not prompt_types or not set(prompt_types) <= set(PROMPT_NAMES):
            raise ValueError(f"the prompt types {list(prompt_types)} are none of {', '.join(PROMPT_NAMES)}")
        self.prompt_types = tuple(prompt_types)

    def _said(self, system: str | None, turns: Sequence[Message]) -> list[Segment]:
        made: list[Segment] = []
        for turn in turns:
            if turn.role == "user":
                question = turn.content if self.prompt_types[0] == "None" else turn.content.strip()
                text = instruction_prompt(question, turn.given, self.prompt_types[0], system)
                made += [*self._begin(), Segment(text, how="start")]
            else:
                made += [Segment(turn.content, turn.taught), self._eos(turn.taught)]
        return made

    def recorded(self) -> dict[str, Any]:
        return {"name": self.name, "prompt_types": list(self.prompt_types)}


class MistralForm(_Turns):
    """The form of Mistral's Instruct models; each version of their tokenizers has its own.

    v1 writes [INST] as text, where it is no control token; v2 and v3 have it as one and put what the system says
    into the last question; v7 has control tokens for that too. Held to mistral-common by tests/test_forms.py.
    """

    name = "mixtral-instruct"
    ends = Ends(lead=" ")

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._marks = {
            name: None if token is None else self._control(token)
            for name in ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
            for token in [tokenizer.controls.get(name)]
        }
        self.version = 1 if self._marks["[INST]"] is None else 3 if self._marks["[SYSTEM_PROMPT]"] is None else 7

    def _nests(self, messages: Sequence[Message]) -> bool:
        return self.version != 3 or not any(message.role == "system" and message.content for message in messages)

    def segments(self, messages: Sequence[Message], *, ask: bool) -> list[Segment]:
        if self.version != 7:
            return super().segments(messages, ask=ask)
        # What the system says may stand anywhere.
        runs = [list(run) for _, run in groupby(messages, key=lambda message: message.role)]
        merged = [one for run in runs for one in (run if run[0].role == "system" else [_merged(run)])]
        others = [message for message in merged if message.role != "system"]
        if not others or others[0].role != "user" or (ask and merged[-1].role != "user"):
            raise ValueError("the first message (behind the system's) and the last must be from the user")
        return self._said(None, merged)

    def _said(self, system: str | None, turns: Sequence[Message]) -> list[Segment]:
        made = self._begin()
        questions = [place for place, turn in enumerate(turns) if turn.role == "user"]
        place_of_system = questions[-1] if self.version == 3 else questions[0]
        for place, turn in enumerate(turns):
            if turn.role == "assistant":
                answer = turn.content if self.version == 1 else turn.content.rstrip(" ")
                if not turn.content:
                    raise ValueError("a message of the assistant is empty, and this form takes none")
                made += [*_spaced(answer, turn.taught), self._eos(turn.taught)]
            elif turn.role == "system":
                made += self._between("[SYSTEM_PROMPT]", turn.text, "[/SYSTEM_PROMPT]")
            else:
                before = f"{system}\n\n" if system and place == place_of_system else ""
                made += self._between("[INST]", before + turn.text, "[/INST]", first=place == questions[0])
        return made

    def _between(self, begin: str, text: str, end: str, *, first: bool = False) -> list[Segment]:
        opened, closed = self._marks[begin], self._marks[end]
        if opened is not None and closed is not None:
            return [opened, *_spaced(text), closed]
        whole = f"{begin} {text} {end}"
        return [Segment(whole, how="start")] if first else [Segment(f" {whole}")]


def _spaced(text: str, learned: bool = False) -> list[Segment]:
    """A text as sentencepiece begins one, with a space."""
    return [Segment(f" {text}", learned)] if text else []


def begin_of(tokenizer: Tokenizer) -> list[Segment]:
    """The token that begins a text, where one does."""
    token = tokenizer.bos_id
    return [] if token is None else [Segment(tokenizer.name(token), control=token)]


def raw_segments(tokenizer: Tokenizer, prompt: str, completion: str) -> list[list[Segment]]:
    """A text that is in no form, of which the completion is learned; none where that says nothing."""
    if not completion.strip():
        return []
    begin = begin_of(tokenizer)
    end = Segment(tokenizer.name(tokenizer.eos_id), True, control=tokenizer.eos_id)
    if not prompt:
        return [[*begin, Segment(completion, True, "start"), end]]
    return [[*begin, Segment(prompt, how="start"), Segment(completion, True), end]]


FORMS: dict[str, type[DefaultForm | AlpacaForm | MistralForm]] = {
    form.name: form for form in (DefaultForm, AlpacaForm, MistralForm)
}
