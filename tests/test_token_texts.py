"""What single tokens say, and which tokens a growing answer shows."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import mistral_common
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import HUGGING_FACE, train_json

from accessory.generation.completion import Completion
from accessory.generation.sampling import Sampling
from accessory.serve.http.generation import Job
from accessory.serve.http.texts import AnswerText, ChatScores, CompletionScores, ScoredToken
from accessory.serve.request import Event, TokenScore
from accessory.serve.token_texts import TokenTexts
from accessory.text.tokenizer import Tokenizer

MISTRAL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
TEXTS = [
    "Hello there.",
    "a\nb\n\n  c",
    "Der B\u00e4r \u2603 \U0001f600!",
    "\u65e5\u672c\u8a9e",
    "   three spaces",
    "1 22",
]
SENTENCEPIECE = Tokenizer(MISTRAL)


@pytest.fixture(scope="module", params=["sentencepiece", *HUGGING_FACE])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "sentencepiece":
        return SENTENCEPIECE
    return Tokenizer(train_json(request.param, tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_make_up_their_text(tokenizer: Tokenizer, text: str) -> None:
    texts = TokenTexts(tokenizer)
    tokens = tokenizer.encode(text, bos=False, eos=False)
    whole = tokenizer.decode(tokens).encode()  # not the text, where a vocabulary lacks characters of it
    parts = [texts[token] for token in tokens]
    parts[0] = texts.leading(tokens[0])
    assert sum(part.size for part in parts) == len(whole)
    if all(part.data is not None for part in parts):
        assert b"".join(part.data or b"" for part in parts) == whole


def test_names_stand_for_what_has_no_text(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    assert (texts[tokenizer.bos_id].text, texts[tokenizer.bos_id].size) == ("<s>", 0)
    assert (texts[tokenizer.eos_id].text, texts[tokenizer.eos_id].data) == ("</s>", b"")
    assert texts[10**6].text == "<1000000>"


def test_bytes_of_a_character() -> None:
    texts = TokenTexts(SENTENCEPIECE)
    tokens = SENTENCEPIECE.encode("\U0001f9ab", bos=False, eos=False)
    assert [texts[token].text for token in tokens[1:]] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0xAB>"]
    assert b"".join(texts[token].data or b"" for token in tokens[1:]) == "\U0001f9ab".encode()
    (newline,) = SENTENCEPIECE.encode("a\n", bos=False, eos=False)[1:]
    assert texts[newline].text == "\n"


TEXTS_OF = TokenTexts(SENTENCEPIECE)


def told(tokens: Sequence[int], sampling: Sampling, prompt: Sequence[int]) -> tuple[str, list[ScoredToken]]:
    """What an answer of these tokens shows: its text and the tokens."""
    completion = Completion(prompt, SENTENCEPIECE, replace(sampling, max_gen_len=len(tokens)))
    answer = AnswerText(TEXTS_OF, SENTENCEPIECE, Job(tokens=prompt, sampling=sampling), show_end=False)
    text, shown = "", list[ScoredToken]()
    for token in tokens:
        fresh = completion.push(token)
        event = Event(text=fresh, tokens=(token,), scores=(TokenScore(token, -1.0),), finish=completion.finish)
        more, scored = answer.push(event)
        text += more
        shown += scored
        if completion.finish:
            break
    assert text == completion.text
    assert answer.tokens == completion.written
    return text, shown


def said(shown: Sequence[ScoredToken]) -> bytes:
    """What an answer's tokens say, each in its place."""
    return b"".join(item.text_in_its_place(item.token, TEXTS_OF).data or b"" for item in shown)


def bytes_of(token: int) -> bytes:
    """By the name in the vocabulary."""
    name = SENTENCEPIECE.name(token)
    if name == "</s>":
        return b""
    return bytes.fromhex(name[3:5]) if name.startswith("<0x") else name.replace("\u2581", " ").encode()


BEGIN = [SENTENCEPIECE.bos_id]
PROMPTS = {"none": BEGIN, "of": SENTENCEPIECE.encode("of", bos=True, eos=False)}
letters = st.sampled_from("ab \n\u00e9\U0001f600#")
few = st.text(st.sampled_from("ab \n\u00e9#"), max_size=3)


@settings(max_examples=600, deadline=None)
@example(written="#", cuts=("#", "#a", ""), prompt="none", ended=True)
@given(
    written=st.text(letters, min_size=1, max_size=20),
    cuts=st.tuples(few, few | st.just(" "), few),
    prompt=st.sampled_from(sorted(PROMPTS)),
    ended=st.booleans(),
)
def test_an_answer_shows_the_tokens_of_its_text(
    written: str, cuts: tuple[str, str, str], prompt: str, ended: bool
) -> None:
    stop, lead, tail = cuts
    tokens, before = SENTENCEPIECE.encode(written, bos=False, eos=ended), PROMPTS[prompt]
    whole = SENTENCEPIECE.decode([*before, *tokens])[len(SENTENCEPIECE.decode(before)) :]
    text, shown = told(tokens, Sampling(stop=(stop,) if stop else (), lead=lead, tail=tail), before)
    start = len(lead.encode()) if whole.startswith(lead) else 0
    end = start + len(text.encode())
    assert whole.encode()[start:end].decode() == text
    # In order those of which a byte is shown; one without a byte of its own goes with what follows it.
    parts = [bytes_of(token) for token in tokens[: len(tokens) - ended]]
    if prompt == "none":
        parts[0] = parts[0].removeprefix(b" ")
    behind = list(accumulate(map(len, parts)))
    spans = [(stop - len(part), stop) for part, stop in zip(parts, behind, strict=True)]
    expected = [
        token
        for token, (first, last) in zip(tokens, spans, strict=False)
        if max(first, start) < min(last, end) or (first == last and (start < end or end == behind[-1]))
    ]
    assert [item.token for item in shown] == expected
    assert said(shown).startswith(text.encode())
    if end == behind[-1]:
        assert said(shown) == text.encode()


@pytest.mark.parametrize(
    ("answer", "lead", "tail", "tokens", "text"),
    [
        (" Hi\n###", " ", "\n###", ["Hi"], "Hi"),  # the lead takes a part of a token, the tail several
        ("\nHi", "\n", "", ["Hi"], "Hi"),
        ("\nHi", "\n\n", "", ["\n", "Hi"], "\nHi"),  # this text does not begin so
        ("\n", "\n", "", [], ""),
        ("Hi ###", "", "\n###", ["Hi", " ###"], "Hi ###"),
    ],
)
def test_what_belongs_to_the_form_is_not_among_the_scores(
    answer: str, lead: str, tail: str, tokens: list[str], text: str
) -> None:
    ids = SENTENCEPIECE.encode("of" + answer, bos=True, eos=True)[len(PROMPTS["of"]) :]
    assert SENTENCEPIECE.decode([*PROMPTS["of"], *ids]) == "of" + answer
    found, shown = told(ids, Sampling(lead=lead, tail=tail), PROMPTS["of"])
    assert found == text
    assert [entry["token"] for entry in ChatScores(TEXTS_OF).of(shown)["content"]] == tokens


def test_other_tokens_in_a_leads_place_lose_it_too() -> None:
    hi, ho, spaced = (SENTENCEPIECE.encode(word, bos=False, eos=False)[0] for word in ("Hi", "Ho", "   a"))
    score = TokenScore(hi, -1.0, top=((hi, -1.0), (ho, -2.0), (spaced, -3.0)))
    answer = AnswerText(TEXTS_OF, SENTENCEPIECE, Job(tokens=PROMPTS["of"], sampling=Sampling(lead=" ")), show_end=False)
    _, shown = answer.push(Event(text="Hi", tokens=(hi,), scores=(score,)))
    (entry,) = ChatScores(TEXTS_OF).of(shown)["content"]
    assert [(top["token"], top["bytes"]) for top in entry["top_logprobs"][:2]] == [("Hi", [72, 105]), ("Ho", [72, 111])]
    assert entry["top_logprobs"][2]["token"] == TEXTS_OF[spaced].text[1:]


@pytest.mark.parametrize("stop_ids", [(), (300,)])
def test_the_token_that_ends_an_answer_is_shown_where_it_is_wanted(stop_ids: tuple[int, ...]) -> None:
    (token,) = stop_ids or (2,)
    event = Event(text="", tokens=(token,), scores=(TokenScore(token, -1.0),), finish="stop")
    job = Job(tokens=BEGIN, sampling=Sampling(stop_ids=stop_ids))
    for show_end in (True, False):
        answer = AnswerText(TEXTS_OF, SENTENCEPIECE, job, show_end=show_end)
        assert [item.token for item in answer.push(event)[1]] == ([token] if show_end else [])
        assert answer.tokens == 1


def test_of_tokens_that_are_written_alike_the_better_one_counts() -> None:
    letter, byte = SENTENCEPIECE.encode("a", bos=False, eos=False)[0], 3 + ord("b")
    assert TEXTS_OF[byte].text == "b"
    (other,) = [token for token in range(259, 32000) if SENTENCEPIECE.name(token) == "b"]
    score = TokenScore(letter, -3.0, top=((byte, -0.5), (other, -2.0)))
    scores = CompletionScores(TEXTS_OF, lead=False).of([ScoredToken(letter, score)])
    assert scores["top_logprobs"] == [{"b": -0.5, " a": -3.0}]
    assert CompletionScores(TEXTS_OF, lead=True).of([ScoredToken(letter, score)])["tokens"] == ["a"]


def test_what_cannot_be_has_a_number_all_the_same() -> None:
    score = TokenScore(300, float("-inf"))
    assert CompletionScores(TEXTS_OF, lead=False).of([ScoredToken(300, score)])["token_logprobs"] == [-9999.0]
