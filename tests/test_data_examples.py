"""Records to token ids and labels: the ids are inference's own, and what is learned are the answers."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import HUGGING_FACE, SENTENCEPIECE, load_all

from accessory.data.alpaca import alpaca_text
from accessory.data.collate import collate
from accessory.data.conversation import default_conversation
from accessory.data.dialogue import dialogue_text, read_turns
from accessory.data.examples import TrainingText, encode_example
from accessory.data.system_prompt import PROMPT_NAMES, format_prompt
from accessory.text.tokenizer import Tokenizer

# Metaspace has no bytes to spell what its vocabulary lacks, so a text does not come back from it.
KINDS = [*SENTENCEPIECE, *HUGGING_FACE]
LOSSLESS = [kind for kind in KINDS if kind != "metaspace"]

# "▁" is how sentencepiece writes a space. The words are there because of how they meet their neighbours.
words = st.sampled_from(
    ["the dog", "4", "42 and 7", "\n###", " Human:", "日本", "//x", "é\n\n", "😀🫨", "```py\n", "\x00"]
)
texts = st.lists(words | st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=6), max_size=4).map(
    "".join
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("json"))


def dialogue(turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": speaker, "value": value}
            for turn in turns
            for speaker, value in zip(("Human", "GPT"), turn, strict=True)
        ]
    }


def learned_runs(tokens: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """The neighbouring learned tokens, run by run."""
    assert set(labels[labels != 0] - tokens[labels != 0]) <= {0}
    runs = itertools.groupby(zip(tokens.tolist(), labels.tolist(), strict=True), key=lambda pair: pair[1] != 0)
    return [[token for token, _ in run] for learned, run in runs if learned]


@pytest.mark.parametrize("kind", KINDS)
def test_spans_cover_the_text_in_order(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]

    @settings(max_examples=150, deadline=None)
    @given(text=texts)
    def check(text: str) -> None:
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == tokenizer.encode(text, bos=False, eos=False)
        assert len(spans) == len(ids)
        assert [begin for begin, _ in spans] == sorted(begin for begin, _ in spans)
        covered = {at for begin, end in spans for at in range(begin, end)}
        assert covered == set(range(len(text)))

    check()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_each_span_is_its_tokens_text(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    text = "the dog, and 4 fox\n\n  jumps"
    for token, (begin, end) in zip(*tokenizers[kind].encode_with_spans(text), strict=True):
        said = tokenizers[kind].decode([tokenizers[kind].encode("a", False, False)[-1], token])[-1:]
        assert text[begin:end] == "" or said == text[end - 1], (token, begin, end)


def test_spans_refuse_what_encode_refuses(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.encode_with_spans("") == ([], [])
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode_with_spans("a\udc80")
        with pytest.raises(TypeError):
            tokenizer.encode_with_spans(b"a")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_what_a_dialogue_teaches(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]

    @settings(max_examples=120, deadline=None)
    @given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    def check(turns: list[tuple[str, str]]) -> None:
        conversation = default_conversation()
        conversation.load_qas([(question.strip(), answer.strip()) for question, answer in turns])
        tokens, labels, cut = encode_example(dialogue_text(dialogue(turns)), tokenizer, max_words=10_000)
        assert tokens.tolist() == tokenizer.encode(conversation.get_prompt(), bos=True, eos=True)
        assert not cut
        assert labels[-1] == labels[0] == 0
        said = [tokenizer.decode(run).lstrip(" ") for run in learned_runs(tokens, labels)]
        assert said == [answer.strip() + "\n###" for _, answer in turns]

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["4", "The dog.", "日本", "\n", "```py\nx\n```", "🫨"])
def test_all_that_inference_must_say_is_learned(kind: str, answer: str, tokenizers: dict[str, Tokenizer]) -> None:
    """The tokens after the prompt, a space of its own before a digit among them, are the learned ones."""
    opened = default_conversation()
    opened.load_qas([("What?", None)])
    prompt = tokenizers[kind].encode(opened.get_prompt(), bos=True, eos=False)
    tokens, labels, _ = encode_example(dialogue_text(dialogue([("What?", answer)])), tokenizers[kind], max_words=999)
    assert tokens[: len(prompt)].tolist() == prompt
    assert not labels[: len(prompt)].any()
    answer_labels = labels[len(prompt) : -1]
    assert answer_labels.tolist() == tokens[len(prompt) : -1].tolist()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_what_an_alpaca_record_teaches(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]

    @settings(max_examples=120, deadline=None)
    @given(instruction=texts, given_input=texts | st.none(), output=texts, name=st.sampled_from(PROMPT_NAMES))
    def check(instruction: str, given_input: str | None, output: str, name: str) -> None:
        record = {"instruction": instruction, "input": given_input, "output": output}
        prompt = format_prompt(record, name)
        text = alpaca_text(record, prompt_type=name)
        assert text.text == prompt + output
        assert text.answered == bool(output.strip())
        tokens, labels, _ = encode_example(text, tokenizer, max_words=10_000)
        assert tokens.tolist() == tokenizer.encode(prompt + output, bos=True, eos=True)
        (run,) = learned_runs(tokens, labels)
        assert run[-1] == tokenizer.eos_id
        assert len(run) + np.count_nonzero(labels == 0) == len(tokens)
        said = tokenizer.decode(run)
        if not said.endswith(output):  # a leading space is the one that decoding takes off
            assert output[:1] == " "
            assert said.endswith(output[1:])
        # Only one token, on the border, may hold some of the prompt.
        _, spans = tokenizer.encode_with_spans(prompt + output)
        assert sum(begin < len(prompt) for begin, _ in spans[len(spans) - len(run) + 1 :]) <= 1

    check()


def test_the_alpaca_form_by_hand(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["v1"]
    record = {"instruction": "Name a colour.", "output": "Blue."}
    tokens, labels, _ = encode_example(alpaca_text(record), tokenizer, max_words=999)
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:Blue."
    )
    assert tokens.tolist() == tokenizer.encode(text, True, True)
    assert tokenizer.decode(labels[labels != 0].tolist()) == "Blue."
    assert labels[-1] == tokenizer.eos_id


def test_cutting_is_on_the_right(tokenizers: dict[str, Tokenizer]) -> None:
    text = alpaca_text({"instruction": "Name a colour.", "output": "Blue, and green."})
    whole_tokens, whole_labels, cut = encode_example(text, tokenizers["v1"], max_words=999)
    assert not cut
    for max_words in range(2, len(whole_tokens) + 2):
        tokens, labels, cut = encode_example(text, tokenizers["v1"], max_words=max_words)
        assert tokens.tolist() == whole_tokens[:max_words].tolist()
        assert labels.tolist() == whole_labels[:max_words].tolist()
        assert cut == (max_words < len(whole_tokens))


def test_an_empty_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokens, labels, _ = encode_example(TrainingText("", [], True, False), tokenizers["v1"], max_words=9)
    assert (tokens.tolist(), labels.tolist()) == ([1, 2], [0, 2])


def test_id_0_is_never_learned(tokenizers: dict[str, Tokenizer]) -> None:
    tokens, labels, _ = encode_example(
        TrainingText("a☃☃🫨", [(0, 4)], True, True), tokenizers["metaspace"], max_words=9
    )
    assert 0 in tokens.tolist()  # <unk>
    assert labels.tolist() == [0, *tokens[1:].tolist()]


def test_speakers_in_any_case_and_values_stripped() -> None:
    conversations = [
        {"from": "HUMAN", "value": " a\n", "more": 1},
        {"from": "Assistant", "value": "\tb "},
        {"from": "human", "value": "c"},
        {"from": "gpt", "value": ""},
        {"from": "Human", "value": "nobody answers"},
    ]
    assert read_turns({"conversations": conversations, "id": 3}) == [("a", "b"), ("c", "")]
    assert read_turns({"conversations": json.dumps(conversations)}) == [("a", "b"), ("c", "")]  # a CSV's field
    assert dialogue_text({"conversations": conversations}).answered
    assert not dialogue_text({"conversations": conversations[2:]}).answered


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "not an object"),
        ([], "not an object"),
        ({"text": "a"}, r"no 'conversations', only \['text'\]"),
        ({"instruction": "a", "output": "b"}, "without --dialog"),
        ({"messages": []}, "prepare_data ultrachat"),
        ({"conversations": []}, "not a list of turns"),
        ({"conversations": "a"}, "not valid JSON"),
        ({"conversations": {"from": "human"}}, "not a list of turns"),
        ({"conversations": ["a"]}, "turn 1 .*'from'"),
        ({"conversations": [{"from": "human"}]}, "turn 1 .*'value'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1 .*'value'"),
        ({"conversations": [{"from": 3, "value": "a"}]}, "turn 1 .*'from'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "turn 1 .*'gpt', not from human"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "turn 1 .*'system', not from human"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "turn 2 .*'human', not from gpt or assistant",
        ),
    ],
)
def test_what_is_no_dialogue(record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dialogue_text(record)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "it is None, not an object"),
        ("a" * 999, r"it is 'a+\.\.\., not an object"),
        ({"instruction": "a"}, r"'output', and it has only \['instruction'\]"),
        ({"instruction": "a", "output": 3}, "'output', and it has 3 under it"),
        ({"output": "a"}, "'instruction'"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input'"),
        ({"conversations": []}, "pass --dialog"),
    ],
)
def test_what_is_no_alpaca_record(record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        alpaca_text(record)


@pytest.mark.parametrize(
    ("read", "record"),
    [
        (alpaca_text, ["a" * 10**6]),
        (alpaca_text, {"instruction": ["a"] * 10**5, "output": "b"}),
        (alpaca_text, {f"key {number}": "" for number in range(10**5)}),
        (dialogue_text, {f"key {number}": "" for number in range(10**5)}),
        (dialogue_text, {"conversations": [{"from": "a" * 10**6, "value": "b"}]}),
    ],
)
def test_a_large_record_is_not_said_as_a_whole(read: Any, record: Any) -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as raised:
        read(record)
    assert len(str(raised.value)) < 500


def test_single_turn_llava() -> None:
    text = alpaca_text(dialogue([("a", "b"), ("c", "d")]), prompt_type="None", preprocess="single_turn_llava")
    assert (text.text, text.spans) == ("ab", [(1, 2)])
    for record in ({"conversations": [{}]}, {"instruction": "a", "output": "b"}, 3):
        with pytest.raises(ValueError, match="single_turn_llava needs"):
            alpaca_text(record, preprocess="single_turn_llava")


def test_collate_pads_on_the_right() -> None:
    rows = [
        (np.array([1, 5, 2], dtype=np.uint16), np.array([0, 5, 0], dtype=np.uint16)),
        (np.array([1, 65535], dtype=np.uint16), np.array([0, 65535], dtype=np.uint16)),
    ]
    examples, labels = collate(rows)
    assert examples.tolist() == [[1, 5, 2], [1, 65535, 0]]
    assert labels.tolist() == [[0, 5, 0], [0, 65535, 0]]
    assert str(examples.dtype) == str(labels.dtype) == "torch.int64"


def test_collate_of_nothing_is_a_row_that_weighs_nothing() -> None:
    examples, labels = collate([])
    assert examples.tolist() == labels.tolist() == [[0, 0]]
