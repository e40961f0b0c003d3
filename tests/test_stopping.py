"""The text of a stream of tokens: exact, only ever growing, and cut at the stop string that begins first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import HUGGING_FACE, MISTRAL, SENTENCEPIECE, load_all

from accessory.generation.detokenizer import settled_text
from accessory.generation.stopping import TextStream
from accessory.text.tokenizer import Tokenizer

KINDS = (*SENTENCEPIECE, "v7", *HUGGING_FACE)


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    v7 = Tokenizer(MISTRAL / "mistral_instruct_tokenizer_241114.model.v7")
    return {"v7": v7, **load_all(tmp_path_factory.mktemp("json"))}


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_what_comes_behind_its_prompt(kind: str, loaded: dict[str, Tokenizer]) -> None:
    """Any tokens, cut into prompt and completion anywhere, against the same work on whole strings."""
    tokenizer = loaded[kind]

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        ids = [*data.draw(st.sampled_from([[], [tokenizer.bos_id]])), *data.draw(id_lists(tokenizer))]
        cut = data.draw(st.integers(0, len(ids)))
        prompt = tokenizer.decode(ids[:cut])
        whole = tokenizer.decode(ids)[len(settled_text(tokenizer, ids[:cut])) :]
        if not prompt.endswith("\ufffd"):  # of half a character the completion has the whole
            assert whole == tokenizer.decode(ids)[len(prompt) :]
        at = st.integers(0, max(len(whole) - 1, 0))
        parts = st.tuples(at, st.integers(1, 4)).map(lambda span: whole[span[0] : sum(span)] or "x")
        stop = data.draw(st.lists(parts, max_size=2))
        lead = data.draw(st.sampled_from(["", " ", whole[:1], whole[:3], whole[:1] + "x"]))
        tail = data.draw(st.sampled_from(["", whole[-1:], whole[-3:], "\n###"]))
        ended = data.draw(st.booleans())
        texts = TextStream(tokenizer, stop, after=ids[:cut], lead=lead, tail=tail)
        expected, stopped = cut_by_ends(whole, stop, lead, tail, ended=ended)
        for token in ids[cut:]:
            texts.push(token)
            assert expected.startswith(texts.text)
        assert (texts.finish(ended=ended), texts.stopped) == (expected, stopped)

    check()


def cut_by_ends(whole: str, stop: Sequence[str], lead: str, tail: str, *, ended: bool) -> tuple[str, bool]:
    """What a whole text shows, and whether a stop string ended it."""
    text = whole.removeprefix(lead)
    if starts := [text.find(item) for item in stop if item in text]:
        return text[: min(starts)], True
    return text.removesuffix(tail) if ended else text, False


def test_behind_control_tokens_alone_a_first_word_has_no_space(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["v3"]
    word = plain(tokenizer)("fox")
    for prompt, expected in (([1], "fox"), ([1, 3], "fox"), ([1, *word], " fox"), ([1, *word, 4], " fox")):
        texts = TextStream(tokenizer, after=prompt)
        for token in word:
            texts.push(token)
        assert texts.finish() == expected


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
    texts = TextStream(Counting(), ("###", "\n\n"), lead=" ", tail="\n###")
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


def show(
    pieces: Sequence[str], stop: Sequence[str], *, lead: str = "", tail: str = "", ended: bool = False
) -> Iterator[tuple[str, bool]]:
    texts = TextStream(Strings(pieces), stop, lead=lead, tail=tail)
    for index in range(len(pieces)):
        texts.push(index)
        yield texts.text, texts.stopped
    yield texts.finish(ended=ended), texts.stopped


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


@pytest.mark.parametrize(("written", "shown"), [("a\n###", "a"), ("a\n### Human:", "a"), ("a\n### Next", None)])
def test_a_tail_and_a_stop_string_that_begins_with_it(written: str, shown: str | None) -> None:
    """Token by token, the end token behind them; a model may end its answer by either."""
    (*_, (text, stopped)) = show(list(written), ["\n### Human:"], tail="\n###", ended=True)
    assert text == (written if shown is None else shown)
    assert stopped == ("Human" in written)


def test_a_tail_is_taken_away_only_where_a_token_ended_the_text() -> None:
    pieces = ["a", "\n#", "##"]
    assert [text for text, _ in show(pieces, [], tail="\n###", ended=True)] == ["a", "a", "a", "a"]
    assert [text for text, _ in show(pieces, [], tail="\n###")] == ["a", "a", "a", "a\n###"]
    assert list(show(["aaa"], [], tail="aa", ended=True)) == [("a", False)] * 2
    assert list(show(["a#b"], ["b"], tail="#", ended=True)) == [("a#", True)] * 2  # the stop string ended it


def test_a_lead_is_taken_away_once_and_held_no_longer_than_it_may_be_one() -> None:
    assert [text for text, _ in show(["\n", "\n", "\n", "a"], [], lead="\n\n")] == ["", "", "\n", "\na", "\na"]
    assert [text for text, _ in show(["\n", "a"], [], lead="\n\n")] == ["", "\na", "\na"]
    assert [text for text, _ in show(["\n"], [], lead="\n\n")] == ["", "\n"]
    assert list(show([" ", "a"], [" "], lead=" ")) == [("", False), ("a", False), ("a", False)]
    assert list(show([" "], [" "], lead=" a")) == [("", False), ("", True)]  # told from the lead at the end only


strings = st.text("ab#\n", max_size=4)


@settings(max_examples=600, deadline=None)
@given(
    pieces=st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=12),
    stop=st.lists(st.text("ab#\n", min_size=1, max_size=5), max_size=4),
    lead=strings,
    tail=strings,
    ended=st.booleans(),
)
def test_the_cuts_against_those_of_the_whole_text(
    pieces: list[str], stop: list[str], lead: str, tail: str, ended: bool
) -> None:
    expected, found = cut_by_ends("".join(pieces), stop, lead, tail, ended=ended)
    steps = list(show(pieces, stop, lead=lead, tail=tail, ended=ended))
    assert steps[-1] == (expected, found)
    for count, (text, stopped) in enumerate(steps[:-1], start=1):
        assert expected.startswith(text)
        if stopped:
            assert text == expected
            continue
        sofar = "".join(pieces[:count])
        if lead.startswith(sofar) and sofar != lead:
            sofar = ""
        # Held: the longest end that a stop string may begin with, or one already there, and before it the tail's.
        sofar = without_begun(sofar.removeprefix(lead), stop)
        assert text == without_begun(sofar, [tail])


def without_begun(text: str, strings: Sequence[str]) -> str:
    """The text without the longest of its ends that one of the strings begins with."""
    ends = [at for at in range(len(text)) if any(item.startswith(text[at:]) for item in strings)]
    return text[: min(ends, default=len(text))]


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
