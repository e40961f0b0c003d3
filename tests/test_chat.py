"""The dialogue in the terminal: in this process with a real engine, and as the command."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE
from programs import Program
from talking import COUNT, DIALOGUES
from walks import write_walk

from accessory.data.conversation import default_conversation
from accessory.generation.sampling import Sampling
from accessory.serve.driver import Driver
from accessory.serve.request import Engine
from accessory.serve.terminal import HELP, Terminal, printable
from accessory.text.form_files import find_form

(QUESTION, ANSWER), (NEXT_QUESTION, NEXT_ANSWER) = DIALOGUES[0]
SETTINGS = ("--device", "cpu", "--dtype", "fp32", "--max_seq_len", "512", "--max-gen-len", "200")


@pytest.fixture(scope="module")
def engine(talking: Path) -> Iterator[Engine]:
    with Driver(talking, max_seq_len=256, slots=1, device="cpu", dtype="fp32") as driver:
        yield driver


def chat(engine: Engine, *lines: str, length: int = 60) -> list[str]:
    """What a terminal without a person shows for these lines."""
    source, sink = io.StringIO("".join(f"{line}\n" for line in lines)), io.StringIO()
    form = find_form(engine.tokenizer, [])
    Terminal(engine, Sampling(max_gen_len=length), form=form, source=source, sink=sink).run()
    return sink.getvalue().splitlines()


def test_a_dialogue_remembers(engine: Engine) -> None:
    assert chat(engine, QUESTION, "", NEXT_QUESTION) == [ANSWER, NEXT_ANSWER]
    assert chat(engine, NEXT_QUESTION) != [NEXT_ANSWER], "or the second answer did not need the first turn"


def test_undo_and_reset_forget(engine: Engine) -> None:
    shown = chat(engine, QUESTION, "/undo", "/undo", QUESTION, NEXT_QUESTION)
    assert shown == [ANSWER, f"[taken back: {QUESTION}]", "[there is no turn to take back]", ANSWER, NEXT_ANSWER]
    assert chat(engine, COUNT, "/reset", QUESTION, length=20)[1:] == ["[a new dialogue]", ANSWER]


def test_commands(engine: Engine) -> None:
    assert chat(engine, "/help", "/exit", QUESTION) == HELP.splitlines()
    assert chat(engine, "/nonsense") == ["[no such command: /nonsense; /help lists them]"]
    assert len(chat(engine, "//help")) >= 1


def test_what_does_not_fit(engine: Engine) -> None:
    (line,) = chat(engine, "word " * 300)
    assert re.fullmatch(r"\[the question makes a prompt of \d+ tokens, and there is room for 196: .*\]", line)
    shown = chat(engine, *[QUESTION] * 6)
    assert "[the context is full: 1 of the oldest turns left out]" in shown


def test_the_terminal_obeys_no_answer(tmp_path: Path, small_tokenizer: Path) -> None:
    conversation = default_conversation()
    conversation.load_qas([["Hello", None]])
    model = write_walk(tmp_path / "walk", small_tokenizer, conversation.get_prompt(), " a\x1b[31mb.\n###")
    with Driver(model, max_seq_len=512, slots=1, device="cpu", dtype="fp32") as engine:
        assert chat(engine, "Hello") == ["a\u241b[31mb."]


def test_printable() -> None:
    assert printable("a\tb\n\u00e9\u4e16") == "a\tb\n\u00e9\u4e16"
    assert printable("\x07\x7f\r\x9b\u202e\u2028") == "\u2407\u2421\u240d\ufffd\ufffd\ufffd"
    assert printable("\U0001f468\u200d\U0001f469") == "\U0001f468\u200d\U0001f469", "one picture of two"


def test_the_command_reads_a_pipe(talking: Path) -> None:
    lines = f"{QUESTION}\n{NEXT_QUESTION}\n"
    command = [sys.executable, "-m", "accessory", "chat", talking, *SETTINGS, "--nproc", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], input=lines, capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [ANSWER, NEXT_ANSWER]


def test_ctrl_c_stops_the_answer_and_then_the_program(talking: Path) -> None:
    with screen() as (shown, terminal):
        command = [sys.executable, "-m", "accessory", "chat", talking, *SETTINGS]
        with Program(command, {"TERM": "dumb"}, terminal=terminal) as program:
            shown.wait_for("ask something, or /help")
            shown.wait_for("> ")
            shown.type(f"{COUNT}\n")
            shown.wait_for("2, 3, 4")
            ctrl_c(program)  # the answer
            assert shown.wait_for(r"tokens/s[^\n]*\]").endswith("; stopped]")
            shown.type(f"{QUESTION}\n")
            shown.wait_for("tokens/s")
            shown.wait_for("> ")
            ctrl_c(program)  # the line
            shown.type("\n")
            shown.wait_for("Ctrl-C again, or Ctrl-D, ends")
            shown.wait_for("> ")
            ctrl_c(program)
            shown.type("\n")
            assert program.wait() == 0
            program.wait_for_all()


def test_sigterm_ends_the_command_and_its_ranks(talking: Path) -> None:
    with screen() as (shown, terminal):
        command = [sys.executable, "-m", "accessory", "chat", talking, *SETTINGS]
        with Program(command, terminal=terminal) as program:
            shown.wait_for("> ")
            program.send(signal.SIGTERM)
            assert program.wait() == -signal.SIGTERM
            program.wait_for_all()


def ctrl_c(program: Program) -> None:
    """A terminal tells all that runs in it.

    One that comes between a prompt and the wait for a key is noticed with the next key; no hand is so quick.
    """
    os.killpg(program.process.pid, signal.SIGINT)


@contextmanager
def screen() -> "Iterator[tuple[Screen, int]]":
    """A terminal as its reader has it, and the end that is a program's."""
    ours, theirs = pty.openpty()
    try:
        yield Screen(ours), theirs
    finally:
        os.close(ours)
        os.close(theirs)


class Screen:
    """What a terminal has shown, and the keys to it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._text = ""
        self._seen = 0

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Wait until what is new matches; returns the match. What follows it is new the next time."""
        end = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self._text, self._seen)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self._text[self._seen :]!r}"
            if select.select([self._descriptor], [], [], 0.1)[0]:
                self._text += os.read(self._descriptor, 4096).decode(errors="replace").replace("\r", "")
        self._seen = found.end()
        return found[0]
