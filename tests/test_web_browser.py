"""The pages in a real browser, on a real engine with the tiny model."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from browser import chromium, keep, needs_chromium
from patience import PATIENCE, wait_until
from programs import slowed
from ranks import free_port
from talking import COUNT, DIALOGUES

from accessory.data.conversation import default_conversation
from accessory.data.system_prompt import format_prompt
from accessory.generation.sampling import Sampling
from accessory.serve.dialogue import Turn, dialogue_prompt
from accessory.serve.driver import Driver
from accessory.serve.options import Account
from accessory.serve.request import Engine
from accessory.serve.web.multi_turn import MultiTurnPage
from accessory.serve.web.page import served
from accessory.serve.web.single_turn import SingleTurnPage
from accessory.text.form_files import find_form

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_chromium

CONTEXT = 512
HOSTILE = (
    "Say <img src=x onerror=\"document.title='taken'\"> <script>alert(1)</script> **bold** $$x$$ ${1} {{value}} &lt;"
)
# The pictures of an answer that a page has shown, one after another.
WATCH = """() => {
  window.shown = [];
  new MutationObserver(() => {
    const bubbles = document.querySelectorAll("#chat [data-testid=bot] .message-content");
    const text = bubbles.length ? bubbles[bubbles.length - 1].innerText : "";
    if (text && text !== window.shown.at(-1)) window.shown.push(text);
  }).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


@pytest.fixture(scope="module")
def engine(talking: Path) -> Iterator[Engine]:
    with Driver(talking, max_seq_len=CONTEXT, slots=3, queue=4, device="cpu", dtype="fp32") as driver:
        yield driver


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def dialogue_address(engine: Engine) -> Iterator[str]:
    with served(
        MultiTurnPage(engine, find_form(engine.tokenizer, [])).blocks, engine, server_port=free_port()
    ) as address:
        yield address


@pytest.fixture(scope="module")
def open_tab(browser: "Browser", dialogue_address: str) -> Iterator[Callable[[str], "Page"]]:
    """Opens a page; whatever it asks of any host but its own is an error at the end."""
    asked: list[str] = []
    with ExitStack() as stack:

        def open_page(address: str) -> "Page":
            page = browser.new_page(viewport={"width": 1080, "height": 640}, color_scheme="light")
            stack.callback(page.close)
            page.set_default_timeout(1000 * PATIENCE)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            page.get_by_role("button", name="Submit").wait_for()
            return page

        yield open_page
    assert asked
    strange = [url for url in asked if not re.match(r"http://127\.0\.0\.1:|data:|blob:", url)]
    assert not strange, "users may be offline, and nothing of theirs is others' affair"


@pytest.fixture(scope="module")
def tab(open_tab: Callable[[str], "Page"], dialogue_address: str) -> "Page":
    return open_tab(dialogue_address)


@pytest.fixture
def page(tab: "Page", engine: Engine) -> "Page":
    """The dialogue's page as it was opened."""
    tab.get_by_role("tab", name="Dialogue").click()
    tab.get_by_role("button", name="Clear", exact=True).last.click()
    expect_bubbles(tab, 0)
    return tab


def says(engine: Engine, tokens: tuple[int, ...], sampling: Sampling) -> str:
    return "".join(event.text for event in engine.submit(tokens, sampling))


def replies(engine: Engine, turns: list[Turn], question: str, length: int) -> str:
    """What the model answers behind these turns."""
    form = find_form(engine.tokenizer, [])
    prompt = dialogue_prompt(form, turns, question, room=CONTEXT - length)
    return says(engine, prompt.tokens, Sampling(max_gen_len=length).with_ends(form.ends))


def set_length(page: "Page", length: int) -> None:
    field = page.get_by_label("number input for Length")
    if not field.is_visible():
        page.get_by_role("button", name="Sampling").click()
    field.fill(str(length))
    field.press("Tab")


def write(page: "Page", question: str, length: int) -> None:
    set_length(page, length)
    page.locator("#question textarea").fill(question)


def submit(page: "Page") -> None:
    page.get_by_role("button", name="Submit").click()


def ask(page: "Page", question: str, length: int) -> None:
    write(page, question, length)
    submit(page)


def finished(page: "Page") -> str:
    """The status line, when the answer has ended."""
    line = page.locator(".status", has_text="tokens/s")
    line.wait_for()
    page.wait_for_function("() => !document.querySelector('button.stop:not([disabled])')")
    return line.inner_text()


def bubbles(page: "Page") -> list[str]:
    return [text.strip() for text in page.locator("#chat .message-content").all_inner_texts()]


def expect_bubbles(page: "Page", count: int) -> None:
    wait_until(lambda: page.locator("#chat .message-content").count() == count)


def test_a_dialogue_streams_goes_back_and_tries_again(page: "Page") -> None:
    (question, answer), (next_question, next_answer) = DIALOGUES[0]
    page.evaluate(WATCH)
    ask(page, COUNT, 200)
    assert re.search(r"^\d+ tokens?, \d+\.\d tokens/s, the first after \d+\.\d\d s$", finished(page))
    assert bubbles(page) == list(DIALOGUES[1][0])
    shown = page.evaluate("() => window.shown")
    assert len(shown) > 2, "it came at once"
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert not any("#" in text for text in shown), "the end mark flashed up"

    page.get_by_role("button", name="Undo").click()
    expect_bubbles(page, 0)
    assert page.locator("#question textarea").input_value() == COUNT
    ask(page, question, 50)
    finished(page)
    ask(page, next_question, 50)
    expect_bubbles(page, 4)
    finished(page)
    assert bubbles(page) == [question, answer, next_question, next_answer]
    assert page.locator("#question textarea").input_value() == ""
    keep(page, "multi_turn")

    page.evaluate(WATCH)
    page.get_by_role("button", name="Retry").click()
    wait_until(lambda: len(page.evaluate("() => window.shown")) > 1)
    finished(page)
    assert bubbles(page) == [question, answer, next_question, next_answer], "the most probable tokens are the same"

    page.get_by_role("button", name="Undo").click()
    expect_bubbles(page, 2)
    assert page.locator("#question textarea").input_value() == next_question


def test_stop_ends_the_answer_and_keeps_it(page: "Page", engine: Engine) -> None:
    with slowed(workers()):
        ask(page, COUNT, 300)
        page.locator("#chat [data-testid=bot]", has_text="3, 4").wait_for()
        page.get_by_role("button", name="Stop").click()
        assert finished(page).endswith("; stopped")
    wait_until(lambda: engine.load.running == 0)
    stopped, whole = bubbles(page)[1], DIALOGUES[1][0][1]
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    ask(page, "And then?", 10)
    expect_bubbles(page, 4)
    finished(page)
    assert bubbles(page)[3] == replies(engine, [(COUNT, stopped)], "And then?", 10)


def test_what_is_typed_is_text(page: "Page") -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    title = page.title()
    ask(page, HOSTILE, 5)
    finished(page)
    assert bubbles(page)[0] == HOSTILE
    assert page.locator("#chat .message-content :is(img, script, strong, .katex)").count() == 0
    assert page.title() == title
    assert not dialogs


def test_errors_are_said_on_the_page(page: "Page") -> None:
    ask(page, "  ", 5)
    page.locator(".status.error", has_text="The question is empty: write one").wait_for()
    ask(page, "word " * 600, 5)
    page.locator(".status.error", has_text="there is room for 507: shorten it").wait_for()
    assert page.locator("#question textarea").input_value() == "word " * 600, "it is not lost"
    assert bubbles(page) == []
    ask(page, "short", 5)
    finished(page)
    assert bubbles(page)[0] == "short"


def test_a_full_context_is_said_and_a_dialogue_may_be_cleared_meanwhile(page: "Page", engine: Engine) -> None:
    ask(page, DIALOGUES[0][0][0], 50)
    finished(page)
    with slowed(workers()):
        ask(page, COUNT, 400)
        page.locator(".status", has_text="the oldest turn is left out").wait_for()
        page.locator("#chat [data-testid=bot]", has_text="3, 4").wait_for()
        page.locator("#chat").get_by_role("button", name="Clear").click()
        wait_until(lambda: engine.load.running == 0)
    expect_bubbles(page, 0)
    page.get_by_role("button", name="Stop", disabled=True).wait_for()
    assert bubbles(page) == []


def test_two_tabs_run_together_and_a_closed_one_ends(
    page: "Page", open_tab: Callable[[str], "Page"], dialogue_address: str, engine: Engine
) -> None:
    other = open_tab(dialogue_address)
    for one in (page, other):
        write(one, COUNT, 300)
    with slowed(workers()):
        for one in (page, other):
            submit(one)
        wait_until(lambda: engine.load.running == 2)
        expect_bubbles(page, 2)
        expect_bubbles(other, 2)
        cancelled = engine.load.cancelled
        other.close()
        wait_until(lambda: engine.load.running == 1)
    finished(page)
    wait_until(lambda: engine.load.running == 0)
    assert engine.load.cancelled == cancelled + 1, "the closed tab's answer went on to its end"
    assert bubbles(page) == list(DIALOGUES[1][0])


def test_the_experts_of_an_answer(page: "Page", engine: Engine) -> None:
    question, answer = DIALOGUES[0][0]
    ask(page, question, 60)
    finished(page)
    page.get_by_role("tab", name="Experts").click()
    rows = page.locator("table.experts tbody tr")
    assert rows.count() == engine.args.n_layers
    for row in rows.all():
        cells = [re.search(r"([\d.]+) %", cell.get_attribute("title") or "") for cell in row.locator("td").all()]
        assert len(cells) == engine.args.moe.num_experts
        assert sum(float(found[1]) for found in cells if found) == pytest.approx(100, abs=0.5)
    pieces = page.locator("#coloured .token")
    assert "".join(pieces.all_inner_texts()).split() == answer.split()
    before = colours_of(page)
    assert len(set(before)) > 2
    page.get_by_label("number input for Layer").fill("3")
    page.get_by_label("number input for Layer").press("Tab")
    wait_until(lambda: colours_of(page) != before)
    assert len(colours_of(page)) == len(before)
    assert page.get_by_role("button", name="expert 7").is_visible(), "the legend"
    keep(page, "experts")


def colours_of(page: "Page") -> list[str]:
    colours: list[str] = page.eval_on_selector_all(
        "#coloured .token", "tokens => tokens.map(token => token.style.backgroundColor)"
    )
    return colours


def test_one_instruction(open_tab: Callable[[str], "Page"], engine: Engine) -> None:
    with served(
        SingleTurnPage(engine, find_form(engine.tokenizer, [])).blocks, engine, server_port=free_port()
    ) as address:
        page = open_tab(address)
        instruction, given, output = (page.locator(f"#{name} textarea") for name in ("instruction", "given", "answer"))
        page.get_by_role("button", name="Submit").click()
        page.locator(".status.error", has_text="The instruction is empty: write one").wait_for()
        question, answer = DIALOGUES[0][0]
        instruction.fill(question)
        page.get_by_role("button", name="Submit").click()
        finished(page)
        wait_until(lambda: output.input_value() == answer)  # it is asked in the form that it was trained on
        page.get_by_role("radio", name="alpaca").check()
        instruction.fill("What is a list?")
        given.fill("In Python.")
        set_length(page, 40)
        page.get_by_role("button", name="Submit").click()
        finished(page)
        prompt = format_prompt({"instruction": "What is a list?", "input": "In Python."}, "alpaca")
        wait_until(lambda: output.input_value() == expected(engine, prompt))
        keep(page, "single_turn")
        page.get_by_label("None").check()
        page.get_by_role("button", name="Submit").click()
        wait_until(lambda: output.input_value() == expected(engine, "What is a list?"))
        conversation = default_conversation()
        conversation.load_qas([[COUNT, None]])
        instruction.fill(conversation.get_prompt())
        set_length(page, 155)
        with slowed(workers()):
            page.get_by_role("button", name="Submit").click()
            wait_until(lambda: "3, 4" in output.input_value())
            page.get_by_role("button", name="Stop").click()
            assert finished(page).endswith("; stopped")
        assert expected(engine, conversation.get_prompt(), 155).startswith(output.input_value())
        instruction.fill("word " * 600)
        page.get_by_role("button", name="Submit").click()
        page.locator(".status.error", has_text="shorten it, or choose a smaller length").wait_for()
        page.get_by_role("button", name="Clear").click()
        wait_until(lambda: output.input_value() == "")
        page.close()


def expected(engine: Engine, prompt: str, length: int = 40) -> str:
    return says(engine, tuple(engine.tokenizer.encode(prompt, bos=True, eos=False)), Sampling(max_gen_len=length))


def test_a_dead_rank_is_said(open_tab: Callable[[str], "Page"], talking: Path) -> None:
    before = workers()
    with Driver(talking, max_seq_len=CONTEXT, slots=1, device="cpu", dtype="fp32") as engine:
        (rank,) = workers() - before
        with served(
            MultiTurnPage(engine, find_form(engine.tokenizer, [])).blocks, engine, server_port=free_port()
        ) as address:
            page = open_tab(address)
            with slowed([rank]):
                ask(page, COUNT, 300)
                page.locator("#chat [data-testid=bot]", has_text="3, 4").wait_for()
                os.kill(rank, signal.SIGKILL)
            page.locator(".status.error", has_text="The model is gone").wait_for()
            page.locator("#model-lost", has_text="The model is gone").wait_for()
            ask(page, "Are you there?", 5)
            page.locator(".status.error", has_text="The model is gone").wait_for()
            page.close()


def workers() -> set[int]:
    """Ranks that this process has started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"accessory.serve.worker" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_a_page_takes_no_files_and_no_large_bodies(dialogue_address: str) -> None:
    upload = httpx.post(f"{dialogue_address}gradio_api/upload", files={"files": b"text"})
    assert upload.status_code == 403
    recording = httpx.post(f"{dialogue_address}gradio_api/process_recording", files={"video": b"text"})
    assert recording.status_code == 403
    large = httpx.post(f"{dialogue_address}gradio_api/queue/join", content=b" " * (2**20 + 1))
    assert large.status_code == 413
    endless = httpx.post(f"{dialogue_address}gradio_api/queue/join", content=iter([b" "]))
    assert endless.status_code == 411
    assert httpx.get(f"{dialogue_address}gradio_api/file=/etc/passwd").status_code == 403


def test_who_has_no_password_stays_out(engine: Engine) -> None:
    account = Account(user="ann", password="secret")
    with served(
        MultiTurnPage(engine, find_form(engine.tokenizer, [])).blocks, engine, server_port=free_port(), auth=account
    ) as address:
        assert httpx.get(f"{address}config").status_code == 401
        for user, password in (("ann", "Secret"), ("bob", "secret"), ("", "")):
            login = httpx.post(f"{address}login", data={"username": user, "password": password})
            assert login.status_code in (400, 422)
        with httpx.Client() as client:
            assert client.post(f"{address}login", data={"username": "ann", "password": "secret"}).status_code == 200
            assert client.get(f"{address}config").status_code == 200
