"""Records to token ids and labels: behind the ids of inference's prompt stand the answer's, which are learned."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import HUGGING_FACE, SENTENCEPIECE, load_all

from accessory.data.collate import collate
from accessory.data.conversation import default_conversation
from accessory.data.examples import Ids, Recipe
from accessory.data.sources import Source
from accessory.data.system_prompt import PROMPT_NAMES, format_prompt
from accessory.text.chat import Message, Segment
from accessory.text.forms import DefaultForm, MistralForm
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


def parts_of(record: Any, tokenizer: Tokenizer, *, dialog: bool = False, **of_source: Any) -> list[list[Segment]]:
    return Recipe(tokenizer, 999, dialog).read(record, Source(Path("a.json"), **of_source))[0]


def example(record: Any, tokenizer: Tokenizer, *, max_words: int = 10_000, **of_source: Any) -> tuple[Ids, Ids, bool]:
    (part,) = parts_of(record, tokenizer, **of_source)
    return Recipe(tokenizer, max_words).encode(part)


def learned_texts(tokens: Ids, labels: Ids, tokenizer: Tokenizer) -> list[str]:
    """What neighbouring learned tokens add to the text before them, run by run."""
    assert set(labels[labels != 0] - tokens[labels != 0]) <= {0}
    texts, end = [], 0
    for learned, run in itertools.groupby(labels.tolist(), key=lambda label: label != 0):
        begin, end = end, end + len(list(run))
        if learned:
            before, whole = (tokenizer.decode(tokens[:at].tolist()) for at in (begin, end))
            assert whole.startswith(before)
            texts.append(whole[len(before) :])
    return texts


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
    form = DefaultForm(tokenizer)

    @settings(max_examples=120, deadline=None)
    @given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    def check(turns: list[tuple[str, str]]) -> None:
        if any("\n### Human:" in answer.rstrip() for _, answer in turns):
            with pytest.raises(ValueError, match=r"its answer holds '\\n### Human:', at which answers end"):
                parts_of(dialogue(turns), tokenizer)
            return
        while turns and not turns[-1][1].strip():  # a question that nobody answers
            turns = turns[:-1]
        if not turns:
            assert parts_of(dialogue([("a", " ")]), tokenizer) == []
            return
        conversation = default_conversation()
        conversation.load_qas([(question.strip(), answer.rstrip()) for question, answer in turns])
        (part,) = parts_of(dialogue(turns), tokenizer)
        assert "".join(one.text for one in part if one.control is None) == conversation.get_prompt()
        tokens, labels, cut = example(dialogue(turns), tokenizer)
        assert not cut
        assert (tokens[0], tokens[-1], labels[0], labels[-1]) == (tokenizer.bos_id, tokenizer.eos_id, 0, tokens[-1])
        ends = ["\n### Human:"] * (len(turns) - 1) + ["\n###"]
        said = [f" {answer.rstrip()}{end}" for (_, answer), end in zip(turns, ends, strict=True) if answer.strip()]
        assert learned_texts(tokens, labels, tokenizer) == said
        # Each answer stands behind what the model is asked with.
        messages: list[Message] = []
        for question, answer in turns:
            messages.append(Message("user", question))
            prompt = form.prompt(messages)
            assert tokens[: len(prompt)].tolist() == prompt
            assert labels[len(prompt)] == (tokens[len(prompt)] if answer.strip() else 0)
            messages.append(Message("assistant", answer))

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["4", "The dog.", "日本", "\n x", "```py\nx\n```", "🫨"])
def test_all_that_inference_must_say_is_learned(kind: str, answer: str, tokenizers: dict[str, Tokenizer]) -> None:
    """The tokens after the prompt, a space of its own before a digit among them, are the learned ones."""
    prompt = DefaultForm(tokenizers[kind]).prompt([Message("user", "What?")])
    if kind == "metaspace" and answer in ("4", "```py\nx\n```", "🫨"):  # which its vocabulary cannot spell
        with pytest.raises(ValueError, match=r"its answer ' .*' does not come back from the tokenizer's ids"):
            example(dialogue([("What?", answer)]), tokenizers[kind])
        return
    tokens, labels, _ = example(dialogue([("What?", answer)]), tokenizers[kind])
    assert tokens[: len(prompt)].tolist() == prompt
    assert not labels[: len(prompt)].any()
    assert labels[len(prompt) :].tolist() == tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_what_an_alpaca_record_teaches(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]

    @settings(max_examples=120, deadline=None)
    @given(instruction=texts, given_input=texts | st.none(), output=texts, name=st.sampled_from(PROMPT_NAMES))
    def check(instruction: str, given_input: str | None, output: str, name: str) -> None:
        record = {"instruction": instruction, "input": given_input, "output": output}
        if not output.strip():
            assert parts_of(record, tokenizer, prompt_type=name) == []
            return
        stripped = instruction if name == "None" else instruction.strip()
        prompt = format_prompt({**record, "instruction": stripped}, name)
        tokens, labels, _ = example(record, tokenizer, prompt_type=name)
        asked = tokenizer.encode(prompt, bos=True, eos=False)
        answered = [*tokenizer.cont(output), tokenizer.eos_id]
        assert tokens.tolist() == [*asked, *answered]
        assert labels.tolist() == [*[0] * len(asked), *answered]
        # A text's first space is the one that decoding takes off.
        assert tokenizer.decode(tokens.tolist()) in (prompt + output, (prompt + output).removeprefix(" "))

    check()


def test_the_alpaca_form_by_hand(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["v1"]
    tokens, labels, _ = example({"instruction": " Name a colour.\n", "output": "Blue. "}, tokenizer)
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:"
    )
    assert tokens.tolist() == [*tokenizer.encode(text, True, False), *tokenizer.cont("Blue. "), tokenizer.eos_id]
    assert tokenizer.decode(labels[labels != 0].tolist()) == "Blue. "
    assert labels[-1] == tokenizer.eos_id


def test_what_else_alpaca_records_say(tokenizers: dict[str, Tokenizer]) -> None:
    """What the system says takes the opening's place; earlier turns stand before the last as examples of their own."""
    tokenizer = tokenizers["v1"]
    record = {"instruction": "And?", "input": "x", "output": "So.", "system": "Be.", "history": [["Why?", "Thus."]]}
    first = "Be.\n\n### Instruction:\nWhy?\n\n### Response:"
    second = "Be.\n\n### Instruction:\nAnd?\n\n### Input:\nx\n\n### Response:"
    for only_last in (False, True):
        tokens, labels, _ = example({**record, "only_last": only_last}, tokenizer)
        ids = [
            [*tokenizer.encode(prompt, True, False), *tokenizer.cont(answer), tokenizer.eos_id]
            for prompt, answer in ((first, "Thus."), (second, "So."))
        ]
        assert tokens.tolist() == ids[0] + ids[1]
        said = learned_texts(tokens, labels, tokenizer)
        assert said == (["So."] if only_last else ["Thus.", "So."])


def test_raw_text_is_learned_as_a_whole_and_of_a_pair_the_completion(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["v1"]
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    tokens, labels, _ = example({"text": "The dog."}, tokenizer)
    assert tokens.tolist() == [bos, *tokenizer.encode("The dog.", False, False), eos]
    assert labels.tolist() == [0, *tokens[1:]]
    tokens, labels, _ = example({"prompt": "The", "completion": " dog."}, tokenizer)
    asked, learned = tokenizer.encode("The", True, False), [*tokenizer.cont(" dog."), eos]
    assert (tokens.tolist(), labels.tolist()) == (asked + learned, [0] * len(asked) + learned)
    assert parts_of({"text": " \n"}, tokenizer) == parts_of({"prompt": "a", "completion": ""}, tokenizer) == []


@pytest.mark.parametrize("form", [DefaultForm, MistralForm])
def test_a_form_for_all_is_that_of_instructions_too(form: type[DefaultForm], tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["v1"]
    recipe = Recipe(tokenizer, 999, form=form(tokenizer))
    source = Source(Path("a.json"), prompt_type="qg")
    for record, question in (
        ({"instruction": "a", "output": "b"}, "a"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\nc"),
    ):
        chat = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "b"}]}
        (ours,), found = recipe.read(record, source)
        (theirs,), _ = recipe.read(chat, source)
        assert ours == theirs
        assert found is recipe.form
        (raw,), nothing = recipe.read({"text": "a"}, source)
        assert (raw[1].text, nothing) == ("a", None)


def test_cutting_is_on_the_right(tokenizers: dict[str, Tokenizer]) -> None:
    record = {"instruction": "Name a colour.", "output": "Blue, and green."}
    whole_tokens, whole_labels, cut = example(record, tokenizers["v1"])
    assert not cut
    for max_words in range(2, len(whole_tokens) + 2):
        tokens, labels, cut = example(record, tokenizers["v1"], max_words=max_words)
        assert tokens.tolist() == whole_tokens[:max_words].tolist()
        assert labels.tolist() == whole_labels[:max_words].tolist()
        assert cut == (max_words < len(whole_tokens))


def test_an_empty_prompt(tokenizers: dict[str, Tokenizer]) -> None:
    tokens, labels, _ = example({"instruction": "", "output": "So."}, tokenizers["v1"], prompt_type="None")
    assert tokens.tolist() == [1, *tokenizers["v1"].cont("So."), 2]
    assert labels.tolist() == [0, *tokens[1:]]


def test_an_answer_that_does_not_come_back_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    """The vocabulary lacks the digit and has no bytes to spell it: <unk>, id 0, would be learned in its place."""
    for answer, shown in (("a4", "' a4"), ("4" * 99, f"' {'4' * 39}'...")):
        with pytest.raises(ValueError, match=rf"its answer {shown}.* does not come back from the tokenizer's ids"):
            example(dialogue([("a", answer)]), tokenizers["metaspace"])
    tokens, labels, _ = example(dialogue([("4", "a")]), tokenizers["metaspace"])  # what is not learned may be lost
    assert 0 in tokens.tolist()
    assert learned_texts(tokens, labels, tokenizers["metaspace"]) == [" a\n###"]


def test_id_0_is_never_learned(tokenizers: dict[str, Tokenizer]) -> None:
    tokens, labels, _ = Recipe(tokenizers["v1"], 9).encode([Segment("<unk>", True, control=0), Segment("a", True)])
    assert (tokens[0], labels[0], labels[1]) == (0, 0, tokens[1])


def test_questions_are_stripped_and_answers_at_their_end(tokenizers: dict[str, Tokenizer]) -> None:
    conversations = [
        {"from": "HUMAN", "value": " a\n", "id": 1},
        {"from": "Assistant", "value": "\tb "},
        {"from": "human", "value": "c"},
        {"from": "gpt", "value": ""},
        {"from": "Human", "value": "nobody answers"},
    ]
    (part,) = parts_of({"conversations": conversations, "id": 3}, tokenizers["v1"])
    assert [(one.text, one.learned) for one in part[2:]] == [(" \tb\n###", True), ("</s>", True)]
    assert part[1].text.endswith("\n\n### Human: a\n### Assistant:")
    assert parts_of({"conversations": conversations[2:]}, tokenizers["v1"]) == []


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "it is None, not an object"),
        ([], r"it is \[\], not an object"),
        ({"instruction": "a", "output": "b"}, "without --dialog"),
        ({"messages": []}, r"its 'messages' is \[\], not a list of turns"),
        ({"conversations": []}, "not a list of turns"),
        ({"conversations": "a"}, "its 'conversations' is 'a', not a list of turns nor the JSON of one"),
        ({"conversations": {"from": "human"}}, "not a list of turns"),
        ({"conversations": [3]}, "turn 1 of its conversations is 3, not an object"),
        ({"conversations": [{"from": "human"}]}, "turn 1 of its conversations has none of value"),
        ({"conversations": [{"from": "human", "value": 3}]}, "'value' turn 1 of its conversations has 3"),
        ({"conversations": [{"from": 3, "value": "a"}]}, "turn 1 of its conversations has 3 under 'from'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "turn 1 .* from the assistant, not from the user"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "turn 2 .* from the user, not from the assistant",
        ),
    ],
)
def test_what_is_no_dialogue(record: Any, reason: str, tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=reason):
        parts_of(record, tokenizers["v1"], dialog=True)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "it is None, not an object"),
        ("a" * 999, r"it is 'a+\.\.\., not an object"),
        ({"instruction": "a"}, r"of no known shape, having \['instruction'\]"),
        ({"instruction": "a", "output": 3}, "it has 3 under 'output', not a string"),
        ({"output": "a"}, r"of no known shape, having \['output'\]"),
        ({"instruction": "a", "input": 3, "output": "b"}, "it has 3 under 'input', not a string"),
        ({"instruction": "a", "output": "b", "notes": "c"}, r"unknown \['notes'\]: pass --ignore_fields notes"),
    ],
)
def test_what_is_no_alpaca_record(record: Any, reason: str, tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=reason):
        parts_of(record, tokenizers["v1"])


@pytest.mark.parametrize(
    "record",
    [
        ["a" * 10**6],
        {"instruction": ["a"] * 10**5, "output": "b"},
        {f"key {number}": "" for number in range(10**5)},
        {"text": "a", **{f"key {number}": "b" for number in range(10**5)}},
        {"conversations": [{"from": "a" * 10**6, "value": "b"}]},
    ],
)
def test_a_large_record_is_not_said_as_a_whole(record: Any, tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as raised:
        parts_of(record, tokenizers["v1"])
    assert len(str(raised.value)) < 1300


def test_single_turn_llava(tokenizers: dict[str, Tokenizer]) -> None:
    """A dialogue's first question and answer, put into the prompt of an instruction."""
    llava: dict[str, Any] = {"preprocess": "single_turn_llava"}
    two = dialogue([("a", "b"), ("c", "d")])
    (part,) = parts_of(two, tokenizers["v1"], prompt_type="None", **llava)
    assert [(one.text, one.learned) for one in part[1:]] == [("a", False), ("b", True), ("</s>", True)]
    alpaca = {"instruction": "a", "output": "b"}
    for kind in PROMPT_NAMES:
        for more in ({}, {"system": "Be."}):
            asked = parts_of({**two, **more, "id": "7"}, tokenizers["v1"], prompt_type=kind, **llava)
            assert asked == parts_of({**alpaca, **more}, tokenizers["v1"], prompt_type=kind)
    for more in ({"form": DefaultForm(tokenizers["v1"])}, {"dialog": True}):
        source = Source(Path("a.json"), **llava)
        asked, form = Recipe(tokenizers["v1"], 999, **more).read(two, source)
        whole, _ = Recipe(tokenizers["v1"], 999).read(
            two if "dialog" in more else dialogue([("a", "b")]), Source(Path())
        )
        assert (asked, type(form)) == (whole, DefaultForm)


def test_what_single_turn_llava_does_not_learn(tokenizers: dict[str, Tokenizer]) -> None:
    question, answer, *more = dialogue([("a", "b"), ("c", "d")])["conversations"]
    for turns in ([question, {**answer, "weight": 0}, *more], [question, {**answer, "value": " "}, *more], [question]):
        assert parts_of({"conversations": turns}, tokenizers["v1"], preprocess="single_turn_llava") == []
    assert parts_of({"conversations": [question, {**answer, "weight": 1}]}, tokenizers["v1"])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "a", "output": "b"}, "single_turn_llava needs a dialogue, and it is {'instruction'"),
        ({"text": "a"}, "single_turn_llava needs a dialogue, and it is {'text'"),
        (3, "it is 3, not an object"),
        ({"conversations": [{}]}, "turn 1 of its conversations has none of from"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": 3}]},
            "turn 2 .* has 3, and only",
        ),
        ({**dialogue([("a", "b")]), "image": "a.jpg"}, "it has 'a.jpg' under 'image': only text can be trained on"),
        ({**dialogue([("a", "b")]), "notes": "c"}, r"it has the unknown \['notes'\]: pass --ignore_fields notes"),
    ],
)
def test_what_single_turn_llava_refuses(record: Any, reason: str, tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=reason):
        parts_of(record, tokenizers["v1"], preprocess="single_turn_llava")


def test_collate_pads_on_the_right() -> None:
    rows = [
        (np.array([1, 5, 2], dtype=np.uint16), np.array([0, 5, 0], dtype=np.uint16)),
        (np.array([1, 65535], dtype=np.uint16), np.array([0, 65535], dtype=np.uint16)),
    ]
    examples, labels, lengths = collate([[row] for row in rows])
    assert lengths is None
    assert examples.tolist() == [[1, 5, 2], [1, 65535, 0]]
    assert labels.tolist() == [[0, 5, 0], [0, 65535, 0]]
    assert str(examples.dtype) == str(labels.dtype) == "torch.int64"


def test_collate_of_nothing_is_a_row_that_weighs_nothing() -> None:
    examples, labels, _ = collate([])
    assert examples.tolist() == labels.tolist() == [[0, 0]]
