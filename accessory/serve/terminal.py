"""A dialogue in a terminal: lines in, answers out as they are written, and a few commands."""

import signal
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

from accessory.generation.sampling import Sampling
from accessory.serve.dialogue import Turn, dialogue_prompt, how_ended
from accessory.serve.request import Busy, Engine, Event, Stream
from accessory.text.forms import Form

HELP = """\
/reset   begin a new dialogue
/undo    take the last question and its answer back
/help    this text
/exit    end (so does Ctrl-D, or Ctrl-C twice at the prompt)
Ctrl-C   stop the answer that is being written
A line that begins with // is a question that begins with /.
"""
_PROMPT = "> "


class Terminal:
    """One dialogue with a model.

    Args:
        sampling: of every answer, to which the form's ends are added.
        form: how the dialogue is put to the model.
        source, sink: the lines to read and where to write; a sink that is no terminal gets no prompts.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        *,
        form: Form,
        seed: int | None = None,
        source: TextIO | None = None,
        sink: TextIO | None = None,
    ) -> None:
        self._engine, self._sampling, self._form, self._seed = engine, sampling.with_ends(form.ends), form, seed
        self._source = sys.stdin if source is None else source
        self._sink = sys.stdout if sink is None else sink
        self._interactive = self._source.isatty() and self._sink.isatty()
        self._turns: list[Turn] = []

    def run(self) -> None:
        """Answer lines until they end.

        Raises:
            RankLost: the model is gone.
        """
        if self._interactive:
            self._note(f"{self._engine.name}: ask something, or /help")
        for line in self._lines():
            if line.startswith("/") and not line.startswith("//"):
                if line == "/exit":
                    return
                self._obey(line)
            else:
                self._answer(line.removeprefix("/"))

    def _obey(self, command: str) -> None:
        if command == "/help":
            self._write(HELP)
        elif command == "/reset":
            self._turns.clear()
            self._note("a new dialogue")
        elif command == "/undo":
            if self._turns:
                question, _ = self._turns.pop()
                self._note(f"taken back: {question}")
            else:
                self._note("there is no turn to take back")
        else:
            self._note(f"no such command: {command}; /help lists them")

    def _answer(self, question: str) -> None:
        try:
            room = self._engine.args.max_seq_len - self._sampling.max_gen_len
            prompt = dialogue_prompt(self._form, self._turns, question, room=room)
            stream = self._engine.submit(prompt.tokens, self._sampling, seed=self._seed)
        except (ValueError, Busy) as error:
            self._note(str(error))
            return
        if prompt.dropped:
            del self._turns[: prompt.dropped]
            self._note(f"the context is full: {prompt.dropped} of the oldest turns left out")
        try:
            text = self._written(stream)
        except FloatingPointError as error:
            self._note(str(error))
            return
        if text:
            self._turns.append((question, text))

    def _written(self, stream: Stream) -> str:
        """Write an answer as it comes; returns it."""
        start, text, tokens, last = time.monotonic(), "", 0, Event()
        try:
            with _interrupting(stream):
                for last in stream:
                    tokens += len(last.tokens)
                    text += last.text
                    self._write(last.text)
        finally:
            stream.cancel()
            self._sink.write("\n")
            self._sink.flush()
        seconds = time.monotonic() - start
        ended = how_ended(last.finish)
        if self._interactive:
            self._note(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s{ended}")
        return text

    def _lines(self) -> Iterator[str]:
        """Lines with something in them, until the end of the source, or Ctrl-C twice in a row."""
        interrupted = False
        while True:
            try:
                line = self._line()
            except KeyboardInterrupt:
                self._write("\n")
                if interrupted or not self._interactive:
                    return
                interrupted = True
                self._note("Ctrl-C again, or Ctrl-D, ends")
                continue
            if not line:
                if self._interactive:
                    self._write("\n")
                return
            if line.strip():
                interrupted = False
                yield line.strip()

    def _line(self) -> str:
        """The next line with its end; "" where there is none."""
        if not self._interactive or self._source is not sys.stdin:
            return self._source.readline()
        with suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit the line and remember earlier ones
        try:
            return input(_PROMPT) + "\n"
        except EOFError:
            return ""

    def _note(self, text: str) -> None:
        """What the program says itself."""
        self._write(f"[{printable(text)}]\n")

    def _write(self, text: str) -> None:
        self._sink.write(printable(text))
        self._sink.flush()


def printable(text: str) -> str:
    """The text with marks in place of what a terminal would obey: control and format characters.

    Newline and tab stay, and so do the joiners that some scripts and pictures are written with.

    Example: "a\\x1b[31mb" becomes "a\\u241b[31mb", with the picture of the escape character.
    """
    return "".join(_mark(character) for character in text)


def _mark(character: str) -> str:
    if character in "\n\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


@contextmanager
def _interrupting(stream: Stream) -> Iterator[None]:
    """Ctrl-C stops the answer meanwhile, and not the program."""

    def stop(number: int, frame: FrameType | None) -> None:
        stream.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
