"""The text of a stream of tokens: exact, only ever growing, and cut at the stop string that begins first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import HUGGING_FACE, SENTENCEPIECE, load_all

from accessory.generation.stopping import TextStream, settled_text
from accessory.text.tokenizer import Tokenizer

KINDS = (*SENTENCEPIECE, *HUGGING_FACE)


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("json"))


def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that stand for single bytes, incomplete characters among them."""
    backend = tokenizer._backend
    if hasattr(backend, "_processor"):
        return [i for i in range(tokenizer.n_words) if backend._processor.is_byte(i)]
    names = backend._names
    return [i for i, name in names.items() if len(name) == 1 or (name.startswith("<0x") and len(name) == 6)]


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of every kind: any, bytes, control and unknown tokens, characters cut at any place, spaces."""
    anything = st.integers(0, tokenizer.n_words - 1).map(lambda i: [i])
    single_bytes = st.lists(st.sampled_from(byte_ids(tokenizer)), max_size=6)
    control = st.lists(st.sampled_from([0, 1, 2]), max_size=3)
    chosen = st.sampled_from(["  ", "é", "☃", "😀a", "\n\n", "日本"])
    words = (st.text(st.characters(codec="utf-8"), max_size=6) | chosen).map(plain(tokenizer))
    cuts = st.integers(0, 5)
    cut_words = st.tuples(words, cuts, cuts).map(lambda drawn: drawn[0][drawn[1] : len(drawn[0]) - drawn[2]])
    parts = st.lists(st.one_of(anything, single_bytes, control, words, cut_words), max_size=12)
    return parts.map(lambda lists: [i for part in lists for i in part])


def plain(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, bos=False, eos=False)


def stream(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[TextStream, list[str]]:
    """The finished stream of `ids` and the text shown after each."""
    texts = TextStream(tokenizer, stop)
    shown = [texts.text]
    for token_id in ids:
        texts.push(token_id)
        shown.append(texts.text)
    shown.append(texts.finish())
    for before, after in itertools.pairwise(shown):
        assert after.startswith(before)
    return texts, shown


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_text_is_the_tokenizers_own(kind: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded[kind]

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(ids=id_lists(tokenizer))
    def check(ids: list[int]) -> None:
        texts, shown = stream(tokenizer, ids)
        whole = tokenizer.decode(ids)
        assert texts.text == texts.finish() == whole
        assert not texts.stopped
        for count, text in enumerate(shown[1:-1], start=1):
            # Nothing is held but what may be half a character, or an open run of bytes.
            now = tokenizer.decode(ids[:count])
            assert now.startswith(text)
            held = now[len(text) :]
            if kind not in ("byte_fallback", "metaspace"):
                assert held in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_one_kind_of_token_are_exact_and_bounded(kind: str, loaded: dict[str, Tokenizer]) -> None:
    """Long runs are where a window that cannot be let go would show."""
    tokenizer = loaded[kind]
    backend_bytes = byte_ids(tokenizer)
    runs = [[1], [0], [plain(tokenizer)(" ")[0]], backend_bytes[-3:-2], backend_bytes[-60:-57]]
    runs.append([1, *plain(tokenizer)("a")])
    for run in runs:
        for lead in ([], plain(tokenizer)("the fox")):
            ids = lead + run * 150
            texts, _ = stream(tokenizer, ids)
            assert texts.text == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_from_another(kind: str, loaded: dict[str, Tokenizer]) -> None:
    """Wherever a text's tokens are cut, in a character or before a word's space, both parts make it up."""
    tokenizer = loaded[kind]
    pieces = st.sampled_from(["  ", "\u00e9", "\u2603\u2603", "\U0001f600a", "\n\n", "\u65e5\u672c", " the fox", "b"])

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(parts=st.lists(pieces, min_size=1, max_size=12), data=st.data())
    def check(parts: list[str], data: st.DataObject) -> None:
        ids = [tokenizer.bos_id, *plain(tokenizer)("".join(parts))]
        cut = data.draw(st.integers(1, len(ids)))
        texts = TextStream(tokenizer, after=ids[:cut])
        for token in ids[cut:]:
            texts.push(token)
        assert settled_text(tokenizer, ids[:cut]) + texts.finish() == tokenizer.decode(ids)

    check()


def test_a_stop_string_may_be_the_space_before_the_first_word(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["v1"]
    prompt = tokenizer.encode("Human: a\nAI:", bos=True, eos=False)
    for stop in (" Human:", " "):
        texts = TextStream(tokenizer, (stop,), after=prompt)
        for token in plain(tokenizer)("Human: b"):
            texts.push(token)
        assert (texts.finish(), texts.stopped) == ("", True)


def test_a_token_costs_the_same_in_a_long_text(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["v1"]
    decoded: list[int] = []

    class Counting:
        def decode(self, ids: Sequence[int]) -> str:
            decoded[-1] += len(ids)
            return tokenizer.decode(ids)

        def is_control(self, token_id: int) -> bool:
            return tokenizer.is_control(token_id)

        def joins_next(self, token_id: int) -> bool:
            return tokenizer.joins_next(token_id)

    text = "The snowman ☃ said 😀 to the fox.\n" * 200
    ids = plain(tokenizer)(text) + byte_ids(tokenizer)[-1:] * 300
    texts = TextStream(Counting(), ("###", "\n\n"))
    for token_id in ids:
        decoded.append(0)
        texts.push(token_id)
    assert max(decoded[: len(plain(tokenizer)(text))]) <= 8  # the text and the new window, a character each
    assert max(decoded) <= 33 + 16  # where nothing but broken bytes come
    assert texts.finish() == text + "\ufffd" * 300


def test_half_a_character_is_held_back(loaded: dict[str, Tokenizer]) -> None:
    for kind in ("v1", "v2", "v3", "byte_level"):
        tokenizer = loaded[kind]
        ids = plain(tokenizer)("a𝄞b")  # no vocabulary here holds the sign: four bytes
        texts, shown = stream(tokenizer, ids)
        assert set(shown) == {"", "a", "a𝄞", "a𝄞b"}
        texts, shown = stream(tokenizer, ids[:-2])
        assert set(shown[:-1]) == {"", "a"}
        assert texts.text == tokenizer.decode(ids[:-2])
        assert "\ufffd" in texts.text


def test_a_newline_is_shown_at_once(loaded: dict[str, Tokenizer]) -> None:
    """Mixtral writes it as a byte; an answer's lines must not lag, nor "\\n" as a stop cost a token more."""
    tokenizer = loaded["v1"]
    (newline,) = plain(tokenizer)("a\n")[1:]
    texts = TextStream(tokenizer, ("\n",))
    texts.push(plain(tokenizer)("a")[0])
    texts.push(newline)
    assert (texts.text, texts.stopped) == ("a", True)


def test_control_tokens_have_no_text(loaded: dict[str, Tokenizer]) -> None:
    for tokenizer in loaded.values():
        fox, dog = map(plain(tokenizer), ("the fox", "the dog"))
        ids = [1, *fox, 2, 2, *dog, 2]
        texts, _ = stream(tokenizer, ids)
        assert "s>" not in texts.text
        assert texts.text == tokenizer.decode(ids)


# A tokenizer whose tokens are whole strings: what is tested below is the search, not the decoding.
class Strings:
    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def is_control(self, token_id: int) -> bool:
        return False

    def joins_next(self, token_id: int) -> bool:
        return False


def show(pieces: Sequence[str], stop: Sequence[str]) -> Iterator[tuple[str, bool]]:
    texts = TextStream(Strings(pieces), stop)
    for index in range(len(pieces)):
        texts.push(index)
        yield texts.text, texts.stopped
    yield texts.finish(), texts.stopped


def test_a_stop_string_over_several_tokens() -> None:
    assert list(show(["Hi", "\n", "##", "# Human"], ["\n###"])) == [
        ("Hi", False), ("Hi", False), ("Hi", False), ("Hi", True), ("Hi", True)
    ]  # fmt: skip
    assert list(show(["Hi", "\n", "##", "!"], ["\n###"]))[-2] == ("Hi\n##!", False)


def test_a_stop_string_inside_a_token_and_tokens_after_it() -> None:
    assert list(show(["one two three", "four"], ["two"])) == [("one ", True)] * 3


def test_a_stop_string_that_begins_within_its_own_beginning() -> None:
    assert [text for text, _ in show(list("aabaac"), ["aac"])] == ["", "", *["aab"] * 5]
    assert list(show(list("xaaab"), ["aab"]))[-1] == ("xa", True)


def test_the_stop_string_that_begins_first_wins() -> None:
    # "b" is complete at the second token, but "abc" began before it and is still possible.
    assert list(show(["a", "b", "c"], ["b", "abc"])) == [("", False), ("", False), ("", True), ("", True)]
    assert list(show(["a", "b", "x"], ["b", "abc"])) == [("", False), ("", False), ("a", True), ("a", True)]
    assert list(show(["a", "b"], ["b", "abc"])) == [("", False), ("", False), ("a", True)]


def test_held_text_is_released_at_the_end() -> None:
    assert list(show(["Hi", "\n##"], ["\n###"])) == [("Hi", False), ("Hi", False), ("Hi\n##", False)]


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=12),
    stop=st.lists(st.text("ab#\n", min_size=1, max_size=5), max_size=4),
)
def test_the_search_against_a_search_of_the_whole_text(pieces: list[str], stop: list[str]) -> None:
    whole = "".join(pieces)
    starts = [whole.find(item) for item in stop if item in whole]
    expected = whole[: min(starts)] if starts else whole
    steps = list(show(pieces, stop))
    assert steps[-1] == (expected, bool(starts))
    for count, (text, stopped) in enumerate(steps[:-1], start=1):
        assert expected.startswith(text)
        sofar = "".join(pieces[:count])
        if stopped:
            assert text == expected
        else:  # held: the longest end that a stop string may begin with, or one already there
            ends = [k for k in range(len(sofar)) if any(item.startswith(sofar[k:]) for item in stop)]
            assert text == sofar[: min(ends, default=len(sofar))]


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_in_real_tokens(kind: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded[kind]

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        ids = data.draw(id_lists(tokenizer))
        whole = tokenizer.decode(ids)
        spans = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 4))
        stop = [whole[a : a + n] or "x" for a, n in data.draw(st.lists(spans, min_size=1, max_size=3))]
        starts = [whole.find(item) for item in stop if item in whole]
        texts, _ = stream(tokenizer, ids, stop)
        assert texts.text == (whole[: min(starts)] if starts else whole)
        assert texts.stopped == bool(starts)

    check()


@pytest.mark.parametrize("stop", [[""], ["a", ""], "###", [b"a"], [None]])
def test_bad_stop_strings_are_refused(stop: object) -> None:
    with pytest.raises(ValueError, match="stop takes a sequence"):
        TextStream(Strings([]), stop)  # type: ignore[arg-type]


def test_mistaken_tokens_are_refused(loaded: dict[str, Tokenizer]) -> None:
    texts = TextStream(loaded["v1"])
    with pytest.raises(ValueError, match="32000"):
        texts.push(32000)
    texts.push(loaded["v1"].encode("a", False, False)[0])
    assert texts.finish() == "a"  # the refused token left nothing behind
    with pytest.raises(ValueError, match="finished"):
        texts.push(5)
