"""An engine on ranks that a launcher has started: the first one serves, the other follows."""

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from checkpoints import random_tensors, small_config, write_folder
from models import load
from programs import Program, by_hand

pytestmark = pytest.mark.alone

PROGRAM = """
import sys, time
from accessory.generation.sampling import Sampling
from accessory.log import setup_logging
from accessory.serve.messages import Link
from accessory.serve.ranks import serve_on_ranks
from accessory.serve.request import RankLost

def program(engine):
    tokens = engine.tokenizer.encode("The list method", bos=True, eos=False)
    for pause in (0, 3):
        time.sleep(pause)
        stream = engine.submit(tokens, Sampling(max_gen_len=20))
        print(f"answer {''.join(event.text for event in stream)!r}", flush=True)
    print("scores", engine.call("evaluate_examples", [tokens])["max_equal"], flush=True)
    if sys.argv[2] == "wait":
        try:
            while engine.ready:
                list(engine.submit(tokens, Sampling(max_gen_len=100)))
        except RankLost as error:
            print(f"lost: {error}", flush=True)  # in one write: another thread logs just then
        assert not engine.ready and engine.failure

def receive(link, at_once=Link.receive):
    try:
        return at_once(link)
    except EOFError:
        time.sleep(0.5)  # a collective fails before the watch over the other rank speaks
        raise

Link.receive = receive
setup_logging()
serve_on_ranks(program, sys.argv[1], slots=2, max_seq_len=128, dtype="fp32", device="cpu", timeout=2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    config = small_config()
    target = tmp_path_factory.mktemp("ranks") / "small"
    return write_folder(target, random_tensors(config, 5), config, files=2, tokenizer=small_tokenizer)


def started(stack: ExitStack, *arguments: Path | str) -> list[Program]:
    """Two ranks that nobody watches."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return [stack.enter_context(Program(command, environment)) for environment in by_hand(2)]


@pytest.mark.usefixtures("one_thread")
def test_the_first_rank_serves_and_all_end_together(folder: Path) -> None:
    """The pause between the two answers is longer than the collectives' time-out."""
    with ExitStack() as stack:
        first, follower = started(stack, folder, "end")
        assert first.wait() == follower.wait() == 0
        for program in (first, follower):
            program.wait_for_all()
    expected = load(folder).generate(["The list method"], max_gen_len=20)[0]
    assert [line for line in first.lines if line.startswith("answer")] == [f"answer {expected!r}"] * 2
    assert "scores [False]" in first.lines
    assert not follower.lines


def test_a_follower_that_is_killed_is_told_to_the_program_and_ends_it(folder: Path) -> None:
    with ExitStack() as stack:
        first, follower = started(stack, folder, "wait")
        first.wait_for("scores")
        os.kill(follower.process.pid, signal.SIGKILL)
        first.wait_for("lost: rank 1 is gone")
        assert first.wait() == 1
        first.wait_for_all()


def test_what_cannot_be_loaded_is_said_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, follower = started(stack, tmp_path / "no_such_folder", "end")
        assert first.wait() == follower.wait() == 1
    assert first.lines == [f"ERROR: checkpoint folder {tmp_path / 'no_such_folder'} does not exist: check the path"]
    assert not follower.lines
