"""Chats as prompts, to the token: against mistral-common's own encoding and the texts of finetuning."""

import json
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from accessory.text.forms import TEMPLATE_NAMES, Message, chat_prompt, find_template
from accessory.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
THEIRS = MistralTokenizer.v1()
MAKE = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


def chat(*messages: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in messages]  # type: ignore[arg-type]


def as_mistral_encodes(messages: list[Message]) -> list[int]:
    theirs = [MAKE[message.role](content=message.content) for message in messages]
    return THEIRS.encode_chat_completion(ChatCompletionRequest(messages=theirs)).tokens


def encoded(*parts: str | int) -> list[int]:
    """Texts one after another, and ids between them."""
    return [
        token
        for part in parts
        for token in ([part] if isinstance(part, int) else TOKENIZER.encode(part, bos=False, eos=False))
    ]


@pytest.mark.parametrize(
    "messages",
    [
        chat(("user", "Hi")),
        chat(("system", "Be brief."), ("user", "Hi")),
        chat(("user", "Hi"), ("assistant", "Hello there."), ("user", "More\nof it")),
        chat(("system", "S"), ("user", "Hi"), ("assistant", " Hello. "), ("user", " More ")),
        chat(("user", "Hi"), ("user", "Ho"), ("assistant", "A"), ("assistant", "B"), ("user", "C")),
        chat(("system", "S"), ("system", "T"), ("user", "Hi")),
        chat(("user", "[/INST] </s> <s>")),
    ],
)
def test_mixtral_instruct_is_mistral_commons(messages: list[Message]) -> None:
    prompt = chat_prompt("mixtral-instruct", messages, TOKENIZER)
    assert prompt.tokens == as_mistral_encodes(messages)
    assert prompt.stop == ()  # an answer ends with the end token


words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(words, words), max_size=3), words, st.none() | words)
def test_any_chat_is_mistral_commons(turns: list[tuple[str, str]], question: str, system: str | None) -> None:
    messages = [] if system is None else chat(("system", system))
    for asked, answer in turns:
        messages += chat(("user", asked), ("assistant", answer))
    messages += chat(("user", question))
    assert chat_prompt("mixtral-instruct", messages, TOKENIZER).tokens == as_mistral_encodes(messages)


def test_the_default_conversation() -> None:
    messages = chat(("user", "What is 2 + 2?"), ("assistant", "4."), ("user", "And 3 + 3?"))
    prompt = chat_prompt("default", messages, TOKENIZER)
    text = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\n\n###"
        " Human: What is 2 + 2?\n### Assistant: 4.\n### Human: And 3 + 3?\n### Assistant:"
    )
    assert prompt.tokens == encoded(TOKENIZER.bos_id, text)
    assert prompt.stop == ("\n###",)


def test_a_system_message_replaces_the_default_conversations_own_sentence() -> None:
    prompt = chat_prompt("default", chat(("system", "Be brief."), ("user", "Hi")), TOKENIZER)
    assert prompt.tokens == encoded(TOKENIZER.bos_id, "Be brief.\n\n### Human: Hi\n### Assistant:")


def test_alpaca_puts_earlier_turns_before_as_whole_examples() -> None:
    messages = chat(("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R"))
    start = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n"
    )
    first, second = f"{start}S\n\nQ\n\n### Response:A", f"{start}R\n\n### Response:"
    prompt = chat_prompt("alpaca", messages, TOKENIZER)
    assert prompt.tokens == encoded(TOKENIZER.bos_id, first, TOKENIZER.eos_id, TOKENIZER.bos_id, second)


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "must be from the user"),
        (chat(("system", "S")), "must be from the user"),
        (chat(("assistant", "A"), ("user", "Q")), "must be from the user"),
        (chat(("user", "Q"), ("assistant", "A")), "must be from the user"),
        (chat(("user", "Q"), ("system", "S"), ("user", "R")), "before all others"),
    ],
)
def test_what_is_no_chat_is_refused(messages: list[Message], says: str, template: str) -> None:
    with pytest.raises(ValueError, match=says):
        chat_prompt(template, messages, TOKENIZER)


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match="default, alpaca, mixtral-instruct"):
        chat_prompt("llama", chat(("user", "Q")), TOKENIZER)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, "default"),
        ({"bos_token": "<s>"}, "default"),
        ({"chat_template": "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"}, "mixtral-instruct"),
        ({"chat_template": "{{ messages }}"}, "default"),
        (["[INST]"], "default"),
        ("{", "default"),
    ],
)
def test_the_template_that_lies_with_a_tokenizer(small_tokenizer: Path, tmp_path: Path, settings, expected) -> None:
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    if settings is not None:
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (tmp_path / "tokenizer_config.json").write_text(text)
    assert find_template(Tokenizer(tmp_path)) == expected
    (tmp_path / "chat_template.jinja").write_text("{{ '[INST]' + messages[0].content }}")
    assert find_template(Tokenizer(tmp_path)) == "mixtral-instruct"
