"""The reference page's two demo commands as they stand, from accessory/ and from the repository's root."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client
from programs import Program
from ranks import free_port
from talking import COUNT, DIALOGUES

import accessory

ROOT = Path(accessory.__file__).parent.parent
PACKAGE = Path(accessory.__file__).parent
SETTINGS = ("--device", "cpu", "--dtype", "fp32", "--max_seq_len", "512")
QUESTION, ANSWER = DIALOGUES[0][0]


@contextmanager
def started(folder: Path, *command: str | Path) -> Iterator[tuple[Program, str]]:
    """A demo, once its page is there, and the page's address."""
    port = free_port()
    arguments = [*command, *SETTINGS, "--server_port", str(port)]
    with Program(arguments, {"PYTHONPATH": str(ROOT)}, folder=folder) as program:
        program.wait_for("Running on http")
        yield program, f"http://127.0.0.1:{port}/"


def single_turn(ranks: int, model: Path) -> list[str | Path]:
    launcher = ["torchrun", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    return [*torchrun(launcher), "demos/single_turn.py", "--pretrained_path", model]


def torchrun(launcher: list[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]


def multi_turn(ranks: int, model: Path) -> list[str | Path]:
    return [sys.executable, "demos/multi_turn.py", "--n_gpus", str(ranks), "--pretrained_path", model]


@contextmanager
def client(address: str) -> Iterator[Client]:
    talker = Client(address, verbose=False)
    try:
        yield talker
    finally:
        talker.close()


def ask_single(talker: Client, instruction: str, system: str = "None", length: int = 20) -> str:
    return str(talker.predict(instruction, "", system, length, 0, 0.95, 0, api_name="/ask")[0])


def ask_multi(talker: Client, question: str, length: int = 60) -> list[str]:
    messages: list[dict[str, Any]] = talker.predict(question, length, 0, 0.95, 0, api_name="/ask")[0]
    return [message["content"][0]["text"] for message in messages]


def end_by_sigterm(program: Program) -> None:
    program.send(signal.SIGTERM)
    assert program.wait() != 0
    program.wait_for_all()


def end_by_a_dead_rank(program: Program, address: str, rank: int) -> None:
    assert httpx.get(f"{address}model-state").json() == {"failure": None}
    os.kill(program.rank(rank), signal.SIGKILL)
    said = ""
    while not said:  # the page's script asks like this
        said = httpx.get(f"{address}model-state").json()["failure"] or ""
    assert f"rank {rank}" in said
    assert program.wait() != 0
    program.wait_for_all()
    assert f"rank {rank}" in program.text


def test_single_turn_alone_from_the_root(talking: Path) -> None:
    command = [sys.executable, "demos/single_turn.py", "--pretrained_path", talking, "--server_name", "0.0.0.0"]
    with started(ROOT, *command) as (program, address):
        with client(address) as talker:
            assert ask_single(talker, "A list is")
        assert "whoever reaches the page may use it: --auth" in program.text
        end_by_sigterm(program)


def test_single_turn_on_two_ranks_from_accessory_ends_with_one(talking: Path) -> None:
    with started(PACKAGE, *single_turn(2, talking)) as (program, address):
        with client(address) as talker:
            assert ask_single(talker, "A list is", "alpaca")
        assert "whoever reaches the page" not in program.text
        end_by_a_dead_rank(program, address, 1)


def test_multi_turn_on_two_ranks_from_accessory(talking: Path) -> None:
    with started(PACKAGE, *multi_turn(2, talking)) as (program, address):
        with client(address) as one, client(address) as other:
            assert ask_multi(one, QUESTION) == [QUESTION, ANSWER]
            assert ask_multi(other, COUNT, 200) == list(DIALOGUES[1][0])
            assert ask_multi(one, DIALOGUES[0][1][0]) == [text for turn in DIALOGUES[0] for text in turn]
        end_by_sigterm(program)


def test_multi_turn_alone_from_the_root_ends_with_its_rank(talking: Path) -> None:
    with started(ROOT, *multi_turn(1, talking)) as (program, address):
        with client(address) as talker:
            assert ask_multi(talker, QUESTION) == [QUESTION, ANSWER]
        end_by_a_dead_rank(program, address, 0)


def test_wrong_arguments_are_one_line(talking: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = one_line(ROOT / "demos" / "multi_turn.py", "--pretrained_path", talking, "--server_port", port)
        assert f"--server_port {port} (Address already in use): give another" in told
    absent = talking / "absent"
    assert f"{absent} does not exist" in one_line(ROOT / "demos" / "single_turn.py", "--pretrained_path", absent)


def one_line(*command: str | Path) -> str:
    """What a program that cannot start says."""
    with Program([sys.executable, *command]) as program:
        assert program.wait() == 1
        program.wait_for_all()
        assert program.lines[-1].startswith("ERROR: ")
        assert "Traceback" not in program.text
        return program.lines[-1]
