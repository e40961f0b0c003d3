"""What single tokens say, and which tokens a growing answer shows."""

from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import HUGGING_FACE, train_json

from accessory.generation.stopping import TextStream
from accessory.serve.http.texts import AnswerText, CompletionScores, ScoredToken
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


def told(tokens: list[int], stop: str, *, ended: bool, continues: bool) -> tuple[str, list[int], str]:
    """What an answer of these tokens shows: its text, the tokens, and the text of all tokens."""
    before = SENTENCEPIECE.encode("of", bos=True, eos=False) if continues else []
    stream = TextStream(SENTENCEPIECE, [stop] if stop else [], after=before)
    answer = AnswerText(TEXTS_OF, SENTENCEPIECE.eos_id, continues=continues, show_end=False)
    text, shown, given = "", list[int](), 0
    for place, token in enumerate(tokens):
        stream.push(token)
        over = stream.stopped or place + 1 == len(tokens)
        so_far = stream.finish() if over else stream.text
        finish = None if not over else "stop" if stream.stopped or ended else "length"
        event = Event(text=so_far[given:], tokens=(token,), scores=(TokenScore(token, -1.0),), finish=finish)
        given = len(so_far)
        more, scored = answer.push(event)
        text += more
        shown += [item.token for item in scored]
        if over:
            break
    return text, shown, SENTENCEPIECE.decode([*before, *tokens])[len("of") if continues else 0 :]


words = st.text(st.sampled_from("ab \n\u00e9\U0001f600#"), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(written=words, stop=st.text(st.sampled_from("ab \n\u00e9#"), max_size=3), continues=st.booleans())
def test_an_answer_shows_the_tokens_of_its_text(written: str, stop: str, continues: bool) -> None:
    tokens = SENTENCEPIECE.encode(written, bos=False, eos=False)
    text, shown, whole = told(tokens, stop, ended=False, continues=continues)
    assert shown == tokens[: len(shown)]  # in order, none twice
    size = sum(TEXTS_OF[token].size for token in shown)
    first = next((token for token in tokens if TEXTS_OF[token].size), None)
    space = 0 if first is None else TEXTS_OF[first].size - TEXTS_OF.leading(first).size
    assert size >= len(text.encode())  # the whole text is covered
    visible = whole[: whole.index(stop)] if stop and stop in whole else whole
    assert text == visible
    if visible == whole:
        assert shown == tokens
    elif shown:  # the last one has a part in it
        before = size - TEXTS_OF[shown[-1]].size - (0 if continues else space)
        assert before < len(text.encode())


def test_the_end_token_is_shown_where_it_is_wanted() -> None:
    event = Event(text="", tokens=(2,), scores=(TokenScore(2, -1.0),), finish="stop")
    for show_end in (True, False):
        answer = AnswerText(TEXTS_OF, 2, continues=False, show_end=show_end)
        assert [item.token for item in answer.push(event)[1]] == ([2] if show_end else [])
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
