"""Chats as tokens, the same where a model is trained and where it is asked; against transformers and mistral-common."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
import tokenizers
from chat_templates import TEMPLATES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from accessory.log import setup_logging
from accessory.text import template
from accessory.text.chat import Ends, Message, encode_example, ids_of
from accessory.text.equivalents import equivalent_template
from accessory.text.form_files import find_form
from accessory.text.forms import AlpacaForm, DefaultForm, Form, MistralForm, raw_segments
from accessory.text.jinja import render_each
from accessory.text.template import TemplateForm
from accessory.text.tokenizer import Tokenizer
from accessory.tools.corpus import documentation_corpus
from accessory.train.finetune import _refuse_another_form

MISTRAL = Path(mistral_common.__file__).parent / "data"
MISTRALS = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v7m1": "mistral_instruct_tokenizer_241114.model.v7m1",
}
# fmt: off
CONTROLS = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "]~!b[", "]~b]",
    "[e~[", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>",  # noqa: RUF001
]
# fmt: on
HUGGING_FACE = ("first", "always", "never", "prepend", "bytes", "bytes-prefix", "strip", "few")
KINDS = (*HUGGING_FACE, *MISTRALS, "small", "added")
CHAT_TEMPLATES = [name for name in TEMPLATES if name not in ("loop-controls", "tojson")]
NO_SYSTEM = ("gemma", "mistral-v1")
ALPACAS = ("alpaca", "None", "shortqa", "qg")
NAMED = ("default", "mixtral-instruct", *(f"alpaca {kind}" for kind in ALPACAS))


@cache
def corpus() -> list[str]:
    return documentation_corpus(60_000)


def write_json(folder: Path, kind: str) -> Path:
    """A tokenizer.json of one of the families that checkpoints carry."""
    folder.mkdir(parents=True)
    special = CONTROLS[:3] if kind == "few" else CONTROLS
    if kind in ("bytes", "bytes-prefix", "strip", "few"):
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes-prefix")
        made.decoder = decoders.ByteLevel()
        spelled, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    else:
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        spelled, alphabet = [f"<0x{byte:02X}>" for byte in range(256)], []
        if kind == "prepend":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*parts, *([] if kind == "never" else [decoders.Strip(" ", 1, 0)])])
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special[:3] + spelled, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    layout = json.loads(made.to_str())
    # A trainer makes every given token special; the bytes are ordinary ones in a released file.
    layout["added_tokens"] = [item for item in layout["added_tokens"] if item["content"][:3] != "<0x"]
    made = tokenizers.Tokenizer.from_str(json.dumps(layout))
    strips = kind == "strip"
    made.add_special_tokens(
        [AddedToken(name, rstrip=strips and "end" in name, lstrip=strips and "INST" in name) for name in special[3:]]
    )
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def write_added(folder: Path) -> Path:
    """Mistral's first tokenizer with tokens that were added for ChatML."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes((MISTRAL / MISTRALS["v1"]).read_bytes())
    added = {
        "32000": {"content": "<|im_end|>", "special": True},
        "32001": {"content": "<|im_start|>", "special": True},
        "32002": {"content": "<think>", "special": False},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return folder


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("forms")
    found = {kind: Tokenizer(MISTRAL / name) for kind, name in MISTRALS.items()}
    found |= {kind: Tokenizer(write_json(folder / kind, kind)) for kind in HUGGING_FACE}
    return {**found, "small": Tokenizer(small_tokenizer), "added": Tokenizer(write_added(folder / "added"))}


@cache
def form_of(name: str, tokenizer: Tokenizer) -> Form:
    if name in TEMPLATES:
        return TemplateForm(tokenizer, TEMPLATES[name], name)
    if name.startswith("alpaca"):
        return AlpacaForm(tokenizer, (name.split()[1],))
    return {"default": DefaultForm, "mixtral-instruct": MistralForm}[name](tokenizer)


# "▁" is how sentencepiece writes a space. The pieces are there because of how they meet their neighbours.
# fmt: off
pieces = st.sampled_from([
    " ", "  ", "\n", "\n\n", "\t", "    x = 1\n", "the", "Yes, it is", " a ", "-", "*", '"', "'", "`", "=", ":", "/",
    "\\", "<", "_", "#", "###", "\n###", "### Title\n", "42", "007", "日本", "é", "😀", "🫨", "\x00", "```py\n", "//x",
    "]", "<think>", "</think>", ">", "|>", "Human:", " ASSISTANT:",
])
# fmt: on
texts = st.lists(pieces | st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=4), max_size=4).map(
    "".join
)
said = st.one_of(texts, texts.map(lambda text: f"a{text}"), pieces)
kinds = st.sampled_from(KINDS)
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def chats(draw: st.DrawFn, most: int = 5, system: bool = True) -> list[Message]:
    """A chat that ends with an answer."""
    made = [Message("system", draw(said))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, most))):
        made += [Message("user", draw(said)), Message("assistant", draw(said), learned=draw(st.integers(0, 3)) > 0)]
    return made


def spaced(messages: Sequence[Message], kind: str) -> bool:
    """Whether the tokenizer puts a space behind an added token within an answer that follows a control token."""
    return kind in ("always", "prepend") and any("think>" in one.content for one in messages)


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.text} for one in messages]


def controls(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    return [token for token in ids if tokenizer.is_control(token)]


def squeezed(text: str) -> str:
    return "".join(text.split())


def runs(learned: Sequence[bool]) -> list[tuple[int, int]]:
    """Begin and end of what is learned."""
    found = []
    for flag, run in groupby(range(len(learned)), key=lambda at: learned[at]):
        places = list(run)
        found += [(places[0], places[-1] + 1)] if flag else []
    return found


@pytest.mark.parametrize("name", [*NAMED, *CHAT_TEMPLATES])
def test_what_is_learned_stands_behind_the_prompt_that_asks_for_it(name: str, loaded: dict[str, Tokenizer]) -> None:
    @quick
    @given(messages=chats(system=name not in NO_SYSTEM), kind=kinds)
    def check(messages: list[Message], kind: str) -> None:
        tokenizer = loaded[kind]
        form = form_of(name, tokenizer)
        taught = [place for place, one in enumerate(messages) if one.taught]
        refused = (
            (name == "mixtral-instruct" and any(not one.content for one in messages[1:]))
            or (name == "default" and any("\n### Human:" in one.content for one in messages))
            or (name in ("qwen3", "deepseek") and any("</think>" in one.content for one in messages))
            or name == "minimax"  # which asks for reasoning
            or (name == "harmony" and spaced(messages, kind))
        )
        if name == "deepseek" and "<｜User｜>" not in tokenizer.controls:  # noqa: RUF001
            return  # the name of its end token holds "▁"
        try:
            examples = [encode_example(part, tokenizer) for part in form.parts(messages)]
        except ValueError:
            assert refused
            return
        found = [(example, run) for example in examples for run in runs(example.learned)]
        assert len(found) == len(taught)
        for place, (example, (begin, end)) in zip(taught, found, strict=True):
            prompt = form.prompt(messages[:place])
            assert example.tokens[:begin] == prompt
            text = tokenizer.decode(example.tokens[:end])
            assert text.startswith(tokenizer.decode(prompt))
            assert squeezed(messages[place].content) in squeezed(text[len(tokenizer.decode(prompt)) :])
            ends = {*tokenizer.eos_ids, *form.ends.stop_ids}
            stops = [stop for stop in form.ends.stop if stop in text[len(tokenizer.decode(prompt)) :]]
            assert example.tokens[end - 1] in ends or stops or place < taught[-1]

    check()


@pytest.mark.parametrize("name", ["qwen3", "minimax", "harmony"])
def test_reasoning_is_learned_before_its_answer(name: str, loaded: dict[str, Tokenizer]) -> None:
    """Each answer in an example of its own, which is the text that transformers renders, behind the prompt for it."""

    @quick
    @given(messages=chats(most=3), kind=kinds, data=st.data())
    def check(messages: list[Message], kind: str, data: st.DataObject) -> None:
        tokenizer = loaded[kind]
        form = form_of(name, tokenizer)
        thoughts = st.builds("a{}b".format, texts.filter(lambda text: "think>" not in text))
        messages = [
            replace(one, reasoning=data.draw(thoughts)) if one.role == "assistant" and one.content.strip() else one
            for one in messages
        ]
        taught = [place for place, one in enumerate(messages) if one.taught]
        try:
            parts = form.parts(messages)
            examples = [encode_example(part, tokenizer) for part in parts]
        except ValueError:
            assert any("</think>" in one.content for one in messages) or spaced(messages, kind)
            return
        for place, part, example in zip(taught, parts, examples, strict=True):
            prompt = form.prompt(messages[:place])
            ((begin, _),) = runs(example.learned)
            assert example.tokens[:begin] == prompt
            assert "".join(one.text for one in part).startswith(form.text(messages[: place + 1], ask=False).rstrip())
            said = squeezed("".join(one.text for one in part if one.learned))
            thought, answer = squeezed(messages[place].reasoning), squeezed(messages[place].content)
            assert said.index(thought) < said.rindex(answer), "in this order"
            typed = [
                one for one in part if one.control is None and one.learned and messages[place].reasoning in one.text
            ]
            assert name != "harmony" or kind not in HUGGING_FACE or typed, "names of control tokens are text"

    check()


def test_reasoning_has_a_place_or_is_refused(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["bytes"]
    chat = [Message("user", "Q"), Message("assistant", "A", reasoning="Hm <|end|>")]
    for name, learned in {
        "qwen3": "<think>\nHm <|end|>\n</think>\n\nA<|im_end|>",
        "minimax": "Hm <|end|>\n</think>\n\nA[e~[",
        "harmony": (
            "<|channel|>analysis<|message|>Hm <|end|><|end|><|start|>assistant<|channel|>final<|message|>A<|return|>"
        ),
    }.items():
        (part,) = form_of(name, tokenizer).parts(chat)
        assert "".join(one.text for one in part if one.learned) == learned
        ends = [one for one in part if one.learned and one.control == tokenizer.controls["<|end|>"]]
        assert len(ends) == (name == "harmony")
    # Within its content, where datasets have it as well.
    (part,) = form_of("minimax", tokenizer).parts([chat[0], Message("assistant", "<think>\nHm\n</think>\n\nA")])
    assert "".join(one.text for one in part if one.learned) == "Hm\n</think>\n\nA[e~["
    (part,) = form_of("harmony", tokenizer).parts([chat[0], Message("assistant", "<think>Hm</think>\nA")])
    assert "".join(one.text for one in part if one.learned).startswith("<|channel|>analysis<|message|>Hm<|end|>")
    (part,) = form_of("chatml", tokenizer).parts([chat[0], Message("assistant", "<think>Hm</think>\nA")])
    assert "".join(one.text for one in part if one.learned) == "<think>Hm</think>\nA<|im_end|>"
    # As GLM's, which writes it otherwise than it stands in a content.
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% set t = m.content.split('</think>') %}"
        "<think>{{ m.reasoning_content or t[:-1][0] | default('') | replace('<think>', '') | trim }}</think>"
        "{{ t[-1].strip() }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for answer in (chat[1], Message("assistant", "<think>\nHm <|end|>\n</think>\n\nA\n")):
        (part,) = TemplateForm(tokenizer, source, "glm").parts([chat[0], answer])
        assert "".join(one.text for one in part if one.learned) == "<think>Hm <|end|></think>A</s>"
    for name in ("chatml", "llama3", "mistral-v3", "deepseek"):
        with pytest.raises(ValueError, match=f"the chat template {name} leaves out the reasoning of its answer"):
            form_of(name, tokenizer).parts(chat)
    for name in ("default", "alpaca alpaca", "mixtral-instruct"):
        with pytest.raises(ValueError, match=r"reasoning, for which the form .* has no place: ignore that field, or"):
            form_of(name, tokenizer).parts(chat)
    with pytest.raises(
        ValueError, match=r"asks for an answer with '<think>\\n', and does not write .* reasoning_content"
    ):
        form_of("minimax", tokenizer).parts([chat[0], Message("assistant", "A")])


def test_only_what_is_learned_is(loaded: dict[str, Tokenizer]) -> None:
    """The end-of-turn token is learned, and nothing behind it; the lead of an answer is."""
    expected = {
        "chatml": "A<|im_end|>",
        "llama2": " A </s>",
        "llama3": "A<|eot_id|>",
        "mistral-v1": "A</s>",
        "mistral-v1-system": " A</s>",
        "mistral-v3": " A</s>",
        "mistral-v7": "A</s>",
        "qwen3": "<think>\n\n</think>\n\nA<|im_end|>",
        "zephyr": "A</s>",
        "gemma": "A<end_of_turn>",
        "phi3": "A<|end|>",
        "deepseek": "A<｜end▁of▁sentence｜>",  # noqa: RUF001
        "generation": "A</s>",
    }
    # The others' answers have reasoning, or an example each: see above and below.
    assert expected.keys() == {*CHAT_TEMPLATES} - {"minimax", "harmony"}
    for name in expected:
        form = form_of(name, loaded["bytes"])
        (part,) = form.parts([Message("user", "Q"), Message("assistant", "A")])
        assert "".join(one.text for one in part if one.learned) == expected[name], name
        more = [Message("user", "Q"), Message("assistant", "B"), Message("user", "R"), Message("assistant", "A")]
        (part,) = form.parts(more)
        mid = expected[name].replace("A", "B").removeprefix("<think>\n\n</think>\n\n")
        assert "".join(one.text for one in part if one.learned) == mid + expected[name], name
    assert raw_segments(loaded["v1"], "Q", " \n") == []
    (raw,) = raw_segments(loaded["v1"], "Q", " A")
    assert [one.text for one in raw if one.learned] == [" A", "</s>"]


def test_where_answers_end(loaded: dict[str, Tokenizer]) -> None:
    thought = "<think>\n\n</think>\n\n"
    expected = {
        "chatml": ("<|im_end|>", "", ""),
        "llama2": ("</s>", " ", " "),
        "llama3": ("<|eot_id|>", "", ""),
        "mistral-v1": ("</s>", "", ""),
        "mistral-v1-system": ("</s>", " ", ""),
        "mistral-v3": ("</s>", " ", ""),
        "mistral-v7": ("</s>", "", ""),
        "qwen3": ("<|im_end|>", thought, ""),
        "zephyr": ("</s>", "", ""),
        "gemma": ("<end_of_turn>", "", ""),
        "phi3": ("<|end|>", "", ""),
        "deepseek": ("<｜end▁of▁sentence｜>", "", ""),  # noqa: RUF001
        "generation": ("</s>", "", ""),
    }
    tokenizer = loaded["bytes"]
    for name, (token, lead, tail) in expected.items():
        ends = Ends(stop_ids=(tokenizer.controls[token],), lead=lead, tail=tail)
        assert form_of(name, tokenizer).ends == ends, name
    # A tokenizer without a template's end token spells its name.
    assert form_of("chatml", loaded["few"]).ends == Ends(stop=("<|im_end|>",))
    assert form_of("phi3", loaded["few"]).ends == Ends(stop=("<|end|>",))
    assert form_of("phi3", loaded["strip"]).ends == Ends(stop_ids=(tokenizer.controls["<|end|>"],))
    for kind in MISTRALS:
        for name in ("mixtral-instruct", "mistral-v7" if "7" in kind else f"mistral-{kind}".replace("v2", "v3")):
            assert form_of(name, loaded[kind]).ends == Ends(lead=" "), (name, kind)
    assert DefaultForm(tokenizer).ends == Ends(stop=("\n### Human:",), lead=" ", tail="\n###")
    assert DefaultForm(tokenizer, learns_end=False).ends == Ends(stop=("\n###",), lead=" ")


@cache
def their_tokenizer(tokenizer: Tokenizer, template: str) -> Any:
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    if tokenizer.is_json:
        return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), **names)
    return LlamaTokenizer.from_pretrained(tokenizer.path.parent, legacy=False, **names)


@pytest.mark.parametrize("name", [*CHAT_TEMPLATES, "loop-controls"])
def test_prompts_are_transformers(name: str, loaded: dict[str, Tokenizer]) -> None:
    """The same text; the same ids where no answer stands in the prompt, for they are tokenised by themselves."""

    @quick
    @given(messages=chats(most=3, system=name not in NO_SYSTEM), kind=st.sampled_from(HUGGING_FACE), single=...)
    def check(messages: list[Message], kind: str, single: bool) -> None:
        tokenizer = loaded[kind]
        form = form_of(name, tokenizer)
        other = their_tokenizer(tokenizer, TEMPLATES[name])
        if any(token in one.content for one in messages for token in tokenizer.controls):
            return  # theirs reads it
        asked = messages[:-1]
        if single:
            asked = [one for one in messages if one.role == "system"] + [messages[-2]]
        for chat, ask in ((asked, True), (messages, False)):
            text = other.apply_chat_template(plain(chat), tokenize=False, add_generation_prompt=ask)
            ids = other.apply_chat_template(plain(chat), add_generation_prompt=ask, return_dict=False)
            segments = form.segments(chat, ask=True) if ask else form.unasked(chat)
            ours = ids_of(segments, tokenizer)
            assert "".join(one.text for one in segments) == text
            if all(one.role != "assistant" for one in chat):
                assert ours == ids
            else:
                assert controls(ours, tokenizer) == controls(ids, tokenizer)
                assert tokenizer.decode(ours).replace(" ", "") == tokenizer.decode(ids).replace(" ", "")

    check()


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_an_answer_is_gone_on_with_as_in_transformers(name: str, loaded: dict[str, Tokenizer]) -> None:
    @quick
    @given(messages=chats(most=3, system=name not in NO_SYSTEM), kind=st.sampled_from(HUGGING_FACE))
    def check(messages: list[Message], kind: str) -> None:
        tokenizer = loaded[kind]
        form = form_of(name, tokenizer)
        assert isinstance(form, TemplateForm)
        other = their_tokenizer(tokenizer, TEMPLATES[name])
        try:
            text = other.apply_chat_template(plain(messages), tokenize=False, continue_final_message=True)
        except ValueError:  # the message does not stand in the text
            return
        if "</think>" in messages[-1].content:
            return
        if name == "minimax" and messages[-1].content and not messages[-1].content.startswith("<"):
            # transformers goes on without the reasoning that this one asks for.
            with pytest.raises(ValueError, match="asks a question otherwise than it writes the question's answer"):
                form.continued(messages)
            return
        segments = form.continued(messages)
        asked = form.text(messages[:-1], ask=True)
        if asked.startswith(text):
            text = asked  # theirs takes off what the template itself writes before a message of nothing
        assert "".join(one.text for one in segments) == text
        prompt = form.prompt(messages[:-1])
        assert ids_of(segments, tokenizer)[: len(prompt)] == prompt

    check()


@pytest.mark.parametrize("name", NAMED)
def test_the_template_of_a_named_form_writes_its_text(name: str, loaded: dict[str, Tokenizer]) -> None:
    @quick
    @given(messages=chats(most=3), kind=kinds)
    def check(messages: list[Message], kind: str) -> None:
        form = form_of(name, loaded[kind])
        for chat, ask in ((messages[:-1], True), (messages, False)):
            try:
                text = "".join(one.text for one in form.segments(chat, ask=ask))
            except ValueError:
                continue
            template = TemplateForm(form.tokenizer, equivalent_template(form), "equivalent")  # type: ignore[arg-type]
            assert template.text(chat, ask=ask) == text

    check()


MAKE = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
THEIRS = {kind: MistralTokenizer.from_file(str(MISTRAL / name)) for kind, name in MISTRALS.items()}


def as_mistral(kind: str, messages: Sequence[Message], prefix: bool = False) -> list[int]:
    made = [MAKE[one.role](content=one.text) for one in messages]
    if prefix:
        made[-1].prefix = True
    return THEIRS[kind].encode_chat_completion(ChatCompletionRequest(messages=made)).tokens


@st.composite
def loose_chats(draw: st.DrawFn) -> list[Message]:
    """Messages of any role, of which the last is the user's."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "system", "user"]), max_size=6))
    return [Message(role, draw(said)) for role in (*roles, "user")]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MISTRALS)
def test_mistrals_form_is_mistral_commons(kind: str, loaded: dict[str, Tokenizer]) -> None:
    """Or refuses, as it does, or where a chat begins with an answer or the system's message stands elsewhere."""
    form = form_of("mixtral-instruct", loaded[kind])

    @settings(max_examples=60, deadline=None)
    @given(messages=loose_chats() | chats().map(lambda chat: chat[:-1]))
    def check(messages: list[Message]) -> None:
        try:
            expected = as_mistral(kind, messages)
        except Exception:
            expected = None
        try:
            ours = form.prompt(messages)
        except ValueError:
            roles = "".join(one.role[0] for one in messages).lstrip("s")
            assert expected is None or roles[0] == "a" or "s" in roles
            return
        if expected is None:
            # Its template has the system's message behind an answer; an empty answer beside another is no answer.
            assert "as" in "".join(one.role[0] for one in messages) or not all(one.content for one in messages)
        else:
            assert ours == expected

    check()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("v1", "mistral-v1"),
        ("v1", "mistral-v1-system"),
        ("v3", "mistral-v3"),
        ("v7", "mistral-v7"),
        ("v7m1", "mistral-v7"),
    ],
)
def test_mistrals_templates_are_mistral_commons(kind: str, name: str, loaded: dict[str, Tokenizer]) -> None:
    form = form_of(name, loaded[kind])

    @quick
    @given(messages=chats(system=name not in NO_SYSTEM))
    def check(messages: list[Message]) -> None:
        if any(not one.content.strip() for one in messages):
            return  # the templates write what mistral-common leaves out
        if kind == "v3":  # the template strips an answer on both sides, mistral-common on the right
            messages = [Message(one.role, one.content.strip()) for one in messages]
            if len({one.content for one in messages}) < len(messages):
                return  # it finds the last question by its text
        assert form.prompt(messages[:-1]) == as_mistral(kind, messages[:-1])
        if messages[-1].content == messages[-1].content.rstrip(" "):
            going = as_mistral(kind, messages, prefix=True)
            assert ids_of(form.continued(messages), loaded[kind]) == going
            whole = ids_of(form.segments(messages, ask=False), loaded[kind])
            assert whole == [*going, loaded[kind].eos_id]

    check()


typed = st.lists(
    st.sampled_from(
        [*CONTROLS, "<|im_", "<|im_start", "start|>", "<", "|>", "<|", ">", "]", "[IN", "<|im_<|im_end|>end|>"]
    )
    | pieces,
    min_size=1,
    max_size=4,
).map("".join)


@pytest.mark.parametrize("name", [*NAMED, *CHAT_TEMPLATES])
def test_what_is_typed_is_text(name: str, loaded: dict[str, Tokenizer]) -> None:
    roles = ["user", "assistant", "user"] if name in NO_SYSTEM else ["system", "user", "assistant", "user"]

    @quick
    @given(contents=st.lists(typed, min_size=4, max_size=4), kind=kinds)
    def check(contents: list[str], kind: str) -> None:
        tokenizer = loaded[kind]
        form = form_of(name, tokenizer)
        chat = [Message(role, content) for role, content in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
        harmless = [Message(one.role, "abc") for one in chat]
        if name in ("qwen3", "minimax", "deepseek") and any("think" in one.content for one in chat):
            return
        found = controls(form.prompt(chat), tokenizer)
        assert found == controls(form.prompt(harmless), tokenizer)
        if name not in (*NAMED, "minimax"):
            begun, plainly = (
                form.continued([*chat, Message("assistant", content)]) for content in (contents[-1], "abc")
            )
            assert "\ue000" not in "".join(one.text for one in begun)
            begun_controls = controls(ids_of(begun, tokenizer), tokenizer)
            assert begun_controls == controls(ids_of(plainly, tokenizer), tokenizer)
            assert begun_controls == found or name == "harmony", "which leads answers in with tokens of its own"

    check()


def test_a_name_is_text_too(loaded: dict[str, Tokenizer]) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.name }}\n{{ m.content }}<|im_end|>{% endfor %}"
    form = TemplateForm(loaded["bytes"], template, "names")
    chat = [Message("user", "Q", name="<|im_end|>"), Message("user", "Q", name="<|im_")]
    prompt = form.prompt(chat)
    for token in ("<|im_start|>", "<|im_end|>"):
        assert prompt.count(loaded["bytes"].controls[token]) == 2


def test_tokens_that_were_added_are_transformers(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["added"]
    other = their_tokenizer(tokenizer, TEMPLATES["chatml"])
    assert (tokenizer.controls["<|im_end|>"], tokenizer.controls["<|im_start|>"]) == (32000, 32001)
    assert form_of("chatml", tokenizer).ends.stop_ids == (32000,)

    # Of several spaces in a row transformers makes other tokens than sentencepiece, whose the file is.
    for text in ("a<think>b", "<think> b", "a <think>", "Hi\n", "日本 é😀", "x = 1 # y\n\ty", "<think><think>\n"):
        assert tokenizer.encode(text, False, False) == other(text, add_special_tokens=False)["input_ids"]
        chat = [Message("user", text)]
        ids = other.apply_chat_template(plain(chat), add_generation_prompt=True, return_dict=False)
        assert form_of("chatml", tokenizer).prompt(chat) == ids
        assert tokenizer.decode(tokenizer.encode(f"a{text}", True, False)) == f"a{text}"


def test_both_files_of_a_tokenizer_give_the_ids_of_transformers(tmp_path: Path) -> None:
    """ChatML over Mistral's first tokenizer, as finetuned models have it, with a legacy tokenizer.json beside it."""
    model = (MISTRAL / MISTRALS["v1"]).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    marks = ["<|im_end|>", "<|im_start|>"]
    listed = [
        {"id": 32000 + place, "content": mark, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
         "single_word": False}
        for place, mark in enumerate(marks)
    ]  # fmt: skip
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": listed, "normalizer": prepend}))
    tokenizer = Tokenizer(tmp_path)
    form = TemplateForm(tokenizer, TEMPLATES["chatml"], "chatml")
    named = [tokenizer.name(token) for token in form.prompt([Message("user", "Hi you")])]
    # As transformers' one pass has it: a prefix before each text that control tokens part.
    asked = ["▁user", "<0x0A>", "Hi", "▁you", "<|im_end|>", "▁", "<0x0A>", "<|im_start|>", "▁assistant", "<0x0A>"]
    assert named[-len(asked) :] == asked


def test_a_state_of_another_form_is_refused(loaded: dict[str, Tokenizer]) -> None:
    """Be its examples as long as those of this one."""
    spaced = TEMPLATES["chatml"].replace("\\n", "\\t")
    first, other = (TemplateForm(loaded["bytes"], source, "x") for source in (TEMPLATES["chatml"], spaced))
    for form, saved, refused in (
        (first, first.digest, False),
        (first, None, False),  # of an older run
        (first, other.digest, True),
        (None, first.digest, True),
        (DefaultForm(loaded["v1"]), DefaultForm(loaded["v1"], learns_end=False).digest, True),
    ):
        with pytest.raises(ValueError, match="another prompt form: give") if refused else nullcontext():
            _refuse_another_form(form, saved, Path("state"))


def test_the_default_form(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["v1"]
    form = DefaultForm(tokenizer)
    chat = [Message("system", "S"), Message("user", " Q "), Message("assistant", "### Title\nbody\n### Next")]
    (part,) = form.parts([*chat, Message("user", "R"), Message("assistant", "A")])
    assert "".join(one.text for one in part) == (
        "<s>S\n\n### Human: Q\n### Assistant: ### Title\nbody\n### Next\n### Human: R\n### Assistant: A\n###</s>"
    )
    learned = [one.text for one in part if one.learned]
    assert learned == [" ### Title\nbody\n### Next\n### Human:", " A\n###", "</s>"]
    with pytest.raises(ValueError, match="Human:'"):
        form.parts([Message("user", "Q"), Message("assistant", "A\n### Human: B")])
    assert "".join(one.text for one in form.unasked(chat[:2])) == "<s>S\n\n### Human: Q\n###"
    assert "".join(one.text for one in form.continued(chat)).endswith("Assistant: ### Title\nbody\n### Next")
    assert form.continued([*chat[:2], Message("assistant", "")]) == form.segments(chat[:2], ask=True)
    for refused in ([], chat, chat[2:], chat[:1]):
        with pytest.raises(ValueError, match="from the user"):
            form.prompt(refused)
    with pytest.raises(ValueError, match="before all others"):
        form.prompt([*chat, *chat])
    with pytest.raises(ValueError, match="from the assistant"):
        form.continued(chat[:2])


def test_answers_that_a_template_changes_are_refused(loaded: dict[str, Tokenizer]) -> None:
    """Or learned each in an example of its own, where the template leaves a part out of earlier ones only."""
    tokenizer = loaded["bytes"]
    thought = "<think>\nHm\n</think>\n\nYes"
    chat = [Message("user", "Q"), Message("assistant", thought), Message("user", "R"), Message("assistant", thought)]
    parts = form_of("qwen3", tokenizer).parts(chat)
    assert ["".join(one.text for one in part if one.learned) for part in parts] == [f"{thought}<|im_end|>"] * 2
    assert "".join(one.text for one in parts[1]).count("Hm") == 1
    for name in ("deepseek", "tojson", "loop-controls"):
        with pytest.raises(ValueError, match=r"changes an answer|leaves out the reasoning of its answer"):
            form_of(name, tokenizer).parts([Message("user", "Q"), Message("assistant", f"{thought} stop")])


def test_a_chat_is_rendered_in_one_round_trip(loaded: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """And what training makes of it too, but where each answer is an example of its own."""
    asked = []
    monkeypatch.setattr(template, "render_each", lambda *job: asked.append(len(job[1])) or render_each(*job))
    chat = [Message(role, f"{number} " * 9) for number in range(30) for role in ("user", "assistant")]
    for kind, name, trips in (("bytes", "chatml", 1), ("v7", "mistral-v7", 1), ("v3", "qwen3", 1)):
        form = form_of(name, loaded[kind])
        form.parts(chat[:2])  # and the tokenizer is tried
        asked.clear()
        form.prompt(chat[:-1])
        assert asked == [2]
        asked.clear()
        assert form.parts(chat)
        assert len(asked) == trips


def test_a_template_that_ends_no_answer_is_learned_with_the_end_token(loaded: dict[str, Tokenizer]) -> None:
    chat = [Message("user", "Q"), Message("assistant", "A"), Message("user", "R"), Message("assistant", "B")]
    for source in (
        "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ):
        form = TemplateForm(loaded["v1"], source, "none")
        parts = form.parts(chat)
        assert len(parts) == 2, "behind an answer in mid-chat there is no end to learn"
        assert form.ends_answers()
        for example in (encode_example(part, loaded["v1"]) for part in parts):
            assert (example.tokens[-1], example.learned[-1]) == (loaded["v1"].eos_id, True)
        assert form.ends.tail == source.partition("content }}")[2].partition("{%")[0].replace("\\n", "\n")
        assert loaded["v1"].eos_id not in form.prompt(chat[:-1])


def test_a_template_may_end_the_last_answer_with_a_token_of_its_own(loaded: dict[str, Tokenizer]) -> None:
    """As gpt-oss's does, whose earlier answers end with <|end|>: each answer is learned as the last one."""
    source = (
        "{% for m in messages %}{{ '<|start_of_turn>' + m.role + '\n' + m.content }}"
        "{{ '<|eot_id|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{{ '<|start_of_turn>assistant\n' if add_generation_prompt }}"
    )
    tokenizer = loaded["bytes"]
    form = TemplateForm(tokenizer, source, "own")
    assert form.ends == Ends(stop_ids=(tokenizer.controls["<|eot_id|>"],))
    assert form.ends_answers()
    chat = [Message("user", "Q"), Message("assistant", "A"), Message("user", "R"), Message("assistant", "B")]
    parts = form.parts(chat)
    assert ["".join(one.text for one in part if one.learned) for part in parts] == ["A<|eot_id|>", "B<|eot_id|>"]
    for part, count in zip(parts, (2, 4), strict=True):
        assert "".join(one.text for one in part) == form.text(chat[:count], ask=False)


def test_an_answer_that_holds_what_ends_answers_is_refused(loaded: dict[str, Tokenizer]) -> None:
    form = TemplateForm(loaded["v1"], "{% for m in messages %}{{ m.role }}: {{ m.content }}\n###{% endfor %}", "text")
    assert form.ends.stop == ("\n###",)
    with pytest.raises(ValueError, match=r"its answer holds '\\n###', at which answers end in this chat template"):
        form.parts([Message("user", "Q"), Message("assistant", "A\n### Title")])


def test_a_tokenizer_that_changes_texts_is_named_and_not_the_record(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(  # its own defaults
        sentence_iterator=iter(corpus()), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300,
        character_coverage=0.99, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"the tokenizer .*tokenizer\.model changes the texts.*form \"default\""):
        DefaultForm(Tokenizer(path)).parts([Message("user", "Q"), Message("assistant", "A")])


def test_a_chat_that_mistrals_form_cannot_say_has_its_spaces(loaded: dict[str, Tokenizer]) -> None:
    """A template that writes a system message where the tokenizer knows none, on the same model as all others."""
    form = form_of("mistral-v7", loaded["v3"])
    chat = [Message("system", "S"), Message("user", "Q"), Message("assistant", "A")]
    for messages in (chat, chat[1:]):
        (part,) = form.parts(messages)
        assert next(one.text for one in part if one.learned) == " A"
    assert form.ends.lead == " "


def test_what_is_said_of_the_files_is_said_by_one_rank() -> None:
    logger = logging.getLogger("accessory.text.form_files")
    for rank in (0, 1):
        setup_logging(rank)
        assert logger.isEnabledFor(logging.WARNING) == (rank == 0)


def test_the_last_folder_that_says_something_rules(tmp_path: Path, small_tokenizer: Path) -> None:
    base, adapter, elsewhere = (tmp_path / name for name in ("base", "adapter", "elsewhere"))
    for folder in (base, adapter, elsewhere):
        folder.mkdir()
    (elsewhere / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    alpaca = json.dumps({"prompt_form": {"name": "alpaca"}})
    (elsewhere / "meta.json").write_text(alpaca)
    tokenizer = Tokenizer(elsewhere)
    assert find_form(tokenizer, [base]).name == "default", "how another model was trained says nothing"
    (elsewhere / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert find_form(tokenizer, [base]).name == "chat_template.jinja", "but its tokenizer's template does"
    (base / "meta.json").write_text(alpaca)
    assert find_form(tokenizer, [base]).name == "alpaca"
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert find_form(tokenizer, [base, adapter]).name == "chat_template.jinja"
    assert find_form(tokenizer, [adapter, base]).name == "alpaca"


@pytest.fixture
def folder(tmp_path: Path, small_tokenizer: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    return tmp_path


def find(folder: Path, asked: str | None = None, **files: Any) -> Form:
    for name, content in files.items():
        path = folder / {"meta": "meta.json", "config": "tokenizer_config.json", "jinja": "chat_template.jinja"}[name]
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return find_form(Tokenizer(folder), [folder], asked)


def test_the_form_that_lies_beside_a_model(folder: Path) -> None:
    form = find(folder)
    assert isinstance(form, DefaultForm)
    assert not form.learns_end
    assert find(folder, config={"chat_template": "1{{ messages[0].content }}"}).name == "tokenizer_config.json"
    named = [{"name": name, "template": f"{name}{{{{ messages[0].content }}}}"} for name in ("default", "rag")]
    form = find(folder, config={"chat_template": named})
    assert isinstance(form, TemplateForm)
    assert form.text([Message("user", "Q")], ask=True) == "defaultQ"
    assert find(folder, "rag").text([Message("user", "Q")], ask=True) == "ragQ"  # type: ignore[attr-defined]
    assert find(folder, jinja="2{{ messages[0].content }}").name == "chat_template.jinja"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("3{{ messages[0].content }}")
    assert find(folder, "tool_use").name == "tool_use"
    assert find(folder, str(folder / "chat_template.jinja")).name == str(folder / "chat_template.jinja")
    form = find(folder, meta={"prompt_form": {"name": "default", "answers_end_at": "\n### Human:"}})
    assert isinstance(form, DefaultForm)
    assert form.learns_end
    form = find(folder, meta={"prompt_form": {"name": "alpaca", "prompt_types": ["qg"]}})
    assert isinstance(form, AlpacaForm)
    assert form.prompt_types == ("qg",)
    assert form.recorded() == {"name": "alpaca", "prompt_types": ["qg"]}
    assert find(folder, "model").name == "alpaca", "the equivalent template is for other programs"
    assert find(folder, "mixtral-instruct").name == "mixtral-instruct"
    assert find(folder, meta={"prompt_form": {"name": "chat_template.jinja"}}).name == "chat_template.jinja"


@pytest.mark.parametrize(
    ("asked", "files", "says"),
    [
        ("llama", {}, "chat_template 'llama' is no file.*default, alpaca, mixtral-instruct, model"),
        ("model", {}, "chat_template model: no chat template lies in"),
        ("{{ x }}" * 1000, {}, "is no file"),
        (None, {"jinja": "a\n{% if %}"}, "chat_template.jinja: line 2 of the chat template: Expected an expression"),
        (None, {"jinja": "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"}, "jinja: "),
        (None, {"jinja": "{{ ''.__class__.mro() }}"}, "chat_template.jinja: the chat template fails: SecurityError"),
        (None, {"jinja": " " * 2**20 + "a"}, "chat_template.jinja has more than 1048576 bytes"),
        (None, {"config": {"chat_template": "{{"}}, "tokenizer_config.json: line 1 of the chat template"),
        (None, {"meta": "{"}, "meta.json is not valid JSON"),
        (None, {"meta": {"prompt_form": "default"}}, "meta.json: prompt_form is 'default'"),
        (None, {"meta": {"prompt_form": {"name": ["alpaca"]}}}, "meta.json: prompt_form is"),
        (None, {"meta": {"prompt_form": {"name": "alpaca", "prompt_types": 5}}}, "meta.json: prompt_form is"),
        (None, {"meta": {"prompt_form": {"name": "alpaca", "prompt_types": [["qg"]]}}}, "meta.json: prompt_form is"),
        (None, {"meta": {"prompt_form": {"name": "chat_template.jinja"}}}, "has no chat_template.jinja"),
    ],
)
def test_a_form_that_cannot_be_had_is_named(folder: Path, asked: str | None, files: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){says}") as caught:
        find(folder, asked, **files)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_utf_8_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 \(at byte 1\)"):
        find(folder)
