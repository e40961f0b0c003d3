"""What the pages are made of, with a real engine and without a browser."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import wait_until
from walks import LAYERS, experts_of, write_walk

from accessory.generation.sampling import Sampling
from accessory.serve.dialogue import dialogue_prompt
from accessory.serve.driver import Driver
from accessory.serve.options import Account
from accessory.serve.request import Engine
from accessory.serve.web.answering import Answer, Answering
from accessory.serve.web.experts import coloured, heatmap
from accessory.serve.web.page import matcher
from accessory.serve.web.parts import status, written
from accessory.serve.web.session import Session
from accessory.text.conversation import default_conversation
from accessory.text.forms import DefaultForm
from accessory.text.tokenizer import Tokenizer

ANSWER = " big(<b>).\n###"
HELLO = "Hello"


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    conversation = default_conversation()
    conversation.load_qas([[HELLO, None]])
    return write_walk(tmp_path_factory.mktemp("walk") / "walk", small_tokenizer, conversation.get_prompt(), ANSWER)


@pytest.fixture(scope="module")
def engine(walk: Path) -> Iterator[Engine]:
    with Driver(walk, max_seq_len=512, slots=2, queue=1, device="cpu", dtype="fp32") as driver:
        yield driver


def form_of(engine: Engine) -> DefaultForm:
    """That of a model which has not learned what follows the mark: the mark is its stop string."""
    return DefaultForm(engine.tokenizer, learns_end=False)


def collect(engine: Engine, tokens: tuple[int, ...], sampling: Sampling) -> list[Answer]:
    """Every picture of an answer that a page would show."""

    async def ask() -> list[Answer]:
        running = Answering(engine, tokens, sampling)
        answers = [running.answer]
        while answers[-1].finish is None:
            answers.append(await running.progress())
        running.stop()
        return answers

    return asyncio.run(ask())


def test_the_mark_that_ends_a_turn_never_shows(engine: Engine) -> None:
    prompt = dialogue_prompt(form_of(engine), [], HELLO, room=200)
    answers = collect(engine, prompt.tokens, Sampling(max_gen_len=50).with_ends(form_of(engine).ends))
    assert answers[-1].text == "big(<b>)."
    assert answers[-1].finish == "stop"
    for answer in answers:
        assert answers[-1].text.startswith(answer.text)
    assert answers[-1].tokens_per_second > 0
    # Without the stop string the model does go on to write the mark.
    assert collect(engine, prompt.tokens, Sampling(max_gen_len=50))[-1].text.startswith(ANSWER)


def test_each_token_has_the_colour_of_its_first_expert(engine: Engine, walk: Path) -> None:
    prompt = dialogue_prompt(form_of(engine), [], HELLO, room=200)
    answer = collect(engine, prompt.tokens, Sampling(max_gen_len=50).with_ends(form_of(engine).ends))[-1]
    for layer in range(LAYERS):
        pieces = coloured(engine.tokenizer, answer, layer)
        assert "".join(text for text, _ in pieces) == "big(<b>)."
        expected = [f"expert {experts_of(walk, token)[layer][0]}" for token in answer.tokens]
        # Every token of this text has characters of its own, and those of the mark were read but not shown.
        assert [name for _, name in pieces] == expected[: len(pieces)]
        assert len(set(expected[: len(pieces)])) > 1, "one colour alone would prove nothing"


def test_the_heatmap_counts_pairs(engine: Engine, walk: Path) -> None:
    prompt = dialogue_prompt(form_of(engine), [], HELLO, room=200)
    answer = collect(engine, prompt.tokens, Sampling(max_gen_len=5))[-1]
    chosen = [expert for token in answer.tokens[:4] for expert in experts_of(walk, token)[0]]
    table = heatmap(answer.routes, 8)
    for expert in range(8):
        share = 100 * chosen.count(expert) / 8
        assert f"title='layer 0, expert {expert}: {share:.1f} %'>{share:.0f}<" in table


def test_tokens_that_make_one_character_are_one_piece(small_tokenizer: Path) -> None:
    tokenizer = Tokenizer(small_tokenizer)
    tokens = tuple(tokenizer.encode("a\u20acb", bos=False, eos=False))
    routes = tuple(((index % 8, 7),) for index in range(len(tokens) - 1))
    answer = Answer(text=tokenizer.decode(tokens), tokens=(*tokens, tokenizer.eos_id), routes=routes)
    pieces = coloured(tokenizer, answer, 0)
    assert [text for text, _ in pieces][-2:] == ["\u20ac", "b"]
    assert pieces[-2][1] == f"expert {len(tokens) - 2}", "the byte that completes it"
    assert pieces[-1][1] is None, "the last token was not read any more"


@pytest.mark.parametrize("lead", ["", " ", " big"])
def test_the_pieces_make_up_the_text_behind_its_prompt(engine: Engine, walk: Path, lead: str) -> None:
    """With the space that begins it, or without where the form has it; whichever token ended it."""
    prompt = dialogue_prompt(form_of(engine), [], HELLO, room=200)
    last = engine.tokenizer.encode(")", bos=False, eos=False)[-1]
    sampling = Sampling(max_gen_len=50, stop_ids=(last,), lead=lead)
    answer = collect(engine, prompt.tokens, sampling)[-1]
    pieces = coloured(engine.tokenizer, answer, 0)
    assert "".join(text for text, _ in pieces) == answer.text == " big(<b>".removeprefix(lead)
    names = [f"expert {experts_of(walk, token)[0][0]}" for token in answer.tokens]
    hidden = len(engine.tokenizer.encode(f"a{lead}", bos=False, eos=False)) - 1 if lead.strip() else 0
    assert [name for _, name in pieces] == names[hidden : hidden + len(pieces)]


def test_leaving_an_answer_frees_its_slot(engine: Engine) -> None:
    """As gradio leaves it when a tab is closed."""
    tokens = dialogue_prompt(form_of(engine), [], HELLO, room=200).tokens

    async def leave() -> None:
        session = Session()
        answers = written(engine, session, lambda: (tokens, Sampling(max_gen_len=300)))
        async for answer in answers:
            assert isinstance(answer, Answer)
            if answer.tokens:
                break
        assert session.running is not None
        await answers.aclose()
        assert session.running is None

    cancelled = engine.load.cancelled
    asyncio.run(leave())
    wait_until(lambda: engine.load.running == 0)
    assert engine.load.cancelled == cancelled + 1


def test_what_is_wrong_takes_the_answers_place(engine: Engine) -> None:
    async def first(session: Session, length: int) -> object:
        tokens = dialogue_prompt(form_of(engine), [], HELLO, room=200).tokens
        answers = written(engine, session, lambda: (tokens, Sampling(max_gen_len=length)))
        found = await anext(answers)
        await answers.aclose()
        return found

    session = Session()
    assert "max_gen_len" in str(asyncio.run(first(session, 0)))
    assert session.running is None, "the next question is taken"
    assert isinstance(asyncio.run(first(session, 5)), Answer)


def test_a_full_queue_is_said(engine: Engine) -> None:
    async def ask() -> list[Answer | Exception]:
        tokens = dialogue_prompt(form_of(engine), [], HELLO, room=200).tokens
        asked = [written(engine, Session(), lambda: (tokens, Sampling(max_gen_len=300))) for _ in range(5)]
        found = [await anext(answers) for answers in asked]
        for answers in asked:
            await answers.aclose()
        return found

    found = asyncio.run(ask())
    assert isinstance(found[0], Answer)
    assert "are waiting already: try again" in str(found[-1])
    wait_until(lambda: engine.load.running == engine.load.waiting == 0)


def test_a_question_without_room_leaves_out_the_oldest_turns(engine: Engine) -> None:
    turns = [(f"question {number}", "a long answer " * 3) for number in range(9)]
    prompt = dialogue_prompt(form_of(engine), turns, "now?", room=250)
    assert 0 < prompt.dropped < 9
    assert len(prompt.tokens) <= 250
    text = engine.tokenizer.decode(prompt.tokens)
    assert "question 8" in text
    assert "question 0" not in text
    with pytest.raises(ValueError, match="there is room for 20: shorten it"):
        dialogue_prompt(form_of(engine), turns, "now?", room=20)
    with pytest.raises(ValueError, match="question is empty"):
        dialogue_prompt(form_of(engine), turns, " \n", room=250)


def test_a_long_dialogue_is_tokenised_a_few_times(engine: Engine) -> None:
    """Not once for each turn that is left out: a page that is open for days has hundreds."""
    sizes: list[int] = []

    class Counting(Tokenizer):
        def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
            sizes.append(len(text))
            return super().encode(text, bos, eos)

    tokenizer = Counting(engine.tokenizer.path)
    turns = [(f"question {number}", "a long answer " * (number % 7)) for number in range(300)]
    for room in (200, 400, 900, 100_000):
        sizes.clear()
        prompt = dialogue_prompt(DefaultForm(tokenizer), turns, "now?", room=room)
        assert len(sizes) <= 12
        assert max(sizes) <= 10 * room
        assert len(prompt.tokens) <= room
        if prompt.dropped:
            assert len(dialogue_prompt(form_of(engine), turns[prompt.dropped - 1 :], "now?", room=10**6).tokens) > room
    assert prompt.dropped == 0


def test_only_the_account_may_enter() -> None:
    match = matcher(Account(user="ann", password="p\u00e4ss:word"))
    assert match("ann", "p\u00e4ss:word")
    assert not match("ann", "p\u00e4ss:wor")
    assert not match("an", "p\u00e4ss:word")
    assert not match("", "")


def test_the_status_line_is_text() -> None:
    assert "&lt;b&gt;" in status("<b>")
