"""The messages of a chat as a model's prompt, in the form that it was finetuned on.

A finetuned model answers well only to the text that it was trained on; tests/test_chat_templates.py holds these forms.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from accessory.text.chat import Message
from accessory.text.conversation import Conversation
from accessory.text.instruction import format_prompt
from accessory.text.tokenizer import CONFIG_NAME, Tokenizer

logger = logging.getLogger(__name__)
_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ChatPrompt:
    """What a model is asked: token ids, and the strings that end its answer beside the end-of-sequence token."""

    tokens: list[int]
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chat:
    """A chat in order: what the system says, the answered questions, and the one to be answered."""

    system: str | None
    answered: tuple[tuple[str, str], ...]
    question: str

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Chat:
        """Sort messages; several of one role in a row are one, with an empty line between them.

        Raises:
            ValueError: there are none, a system message stands behind another, or the first or last of the rest is
                not the user's.
        """
        merged = [
            Message(role, "\n\n".join(message.content for message in run))
            for role, run in groupby(messages, key=lambda message: message.role)
        ]
        system = merged.pop(0).content if merged and merged[0].role == "system" else None
        if any(message.role == "system" for message in merged):
            raise ValueError("a system message must stand before all others")
        if not merged or merged[0].role != "user" or merged[-1].role != "user":
            raise ValueError("the first message (behind the system's) and the last must be from the user")
        texts = [message.content for message in merged]
        return cls(system, tuple(zip(texts[0:-1:2], texts[1::2], strict=True)), texts[-1])


def chat_prompt(template: str, messages: Sequence[Message], tokenizer: Tokenizer) -> ChatPrompt:
    """Put a chat into the template of that name.

    Raises:
        ValueError: an unknown template, or messages that make no chat.
    """
    if template not in _TEMPLATES:
        raise ValueError(f"unknown chat template {template!r}: take one of {', '.join(TEMPLATE_NAMES)}")
    return _TEMPLATES[template](Chat.of(messages), tokenizer)


def find_template(tokenizer: Tokenizer) -> str:
    """The template that lies with a tokenizer: "mixtral-instruct" where it writes [INST], else "default".

    Hugging Face's chat template is the file chat_template.jinja, or in older folders a field of
    tokenizer_config.json.
    """
    for name, theirs in _written_templates(Path(tokenizer.path).parent):
        if "[INST]" in theirs:
            logger.info('dialogues are put into the template "mixtral-instruct", as %s writes [INST]', name)
            return "mixtral-instruct"
    logger.info('dialogues are put into the template "default": no other lies with the tokenizer')
    return "default"


def _written_templates(folder: Path) -> Iterator[tuple[str, str]]:
    """The names of files that hold a chat template, and the templates."""
    with suppress(OSError):
        yield _TEMPLATE_FILE, (folder / _TEMPLATE_FILE).read_text(errors="replace")
    with suppress(OSError, ValueError):
        settings = json.loads((folder / CONFIG_NAME).read_bytes())
        if isinstance(settings, dict):
            yield CONFIG_NAME, str(settings.get("chat_template"))


def _default(chat: Chat, tokenizer: Tokenizer) -> ChatPrompt:
    """The default conversation; a system message takes the place of its own sentence."""
    conversation = Conversation() if chat.system is None else Conversation(system=chat.system)
    conversation.load_qas([*chat.answered, (chat.question, None)])
    tokens = tokenizer.encode(conversation.get_prompt(), bos=True, eos=False)
    return ChatPrompt(tokens, (conversation.response_end_signal,))


def _alpaca(chat: Chat, tokenizer: Tokenizer) -> ChatPrompt:
    """Alpaca's prompt, of one turn. Earlier turns go before it as whole examples, as a model has seen them."""

    def prompt(question: str) -> str:
        return format_prompt({"instruction": question}, "alpaca")

    tokens: list[int] = []
    answered, question = _with_system_in_question(chat)
    for asked, answer in answered:
        tokens += tokenizer.encode(prompt(asked) + answer, bos=True, eos=True)
    return ChatPrompt(tokens + tokenizer.encode(prompt(question), bos=True, eos=False))


def _mixtral_instruct(chat: Chat, tokenizer: Tokenizer) -> ChatPrompt:
    """Mixtral-Instruct's form. Each part is tokenised by itself and an answer is closed by the end token."""

    def ask(question: str) -> list[int]:
        return tokenizer.encode(f"[INST] {question} [/INST]", bos=False, eos=False)

    tokens = [tokenizer.bos_id]
    answered, question = _with_system_in_question(chat)
    for asked, answer in answered:
        tokens += [*ask(asked), *tokenizer.encode(answer, bos=False, eos=True)]
    return ChatPrompt(tokens + ask(question))


def _with_system_in_question(chat: Chat) -> tuple[list[tuple[str, str]], str]:
    """The turns, with what the system says at the beginning of the first question."""
    answered, question = list(chat.answered), chat.question
    if chat.system is not None and answered:
        answered[0] = (f"{chat.system}\n\n{answered[0][0]}", answered[0][1])
    elif chat.system is not None:
        question = f"{chat.system}\n\n{question}"
    return answered, question


_TEMPLATES: dict[str, Callable[[Chat, Tokenizer], ChatPrompt]] = {
    "default": _default,
    "alpaca": _alpaca,
    "mixtral-instruct": _mixtral_instruct,
}
TEMPLATE_NAMES = tuple(_TEMPLATES)
