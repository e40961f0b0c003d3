"""`accessory serve` as a process: it starts, answers, loses ranks and ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from http_api import assert_error
from patience import PATIENCE, wait_until
from programs import Program
from ranks import free_port, run_command

from accessory.cli import main
from accessory.commands.demos import multi_turn, single_turn
from accessory.serve.http import server
from accessory.serve.http.settings import ServerSettings
from accessory.serve.request import Load, RankLost

SERVE = (sys.executable, "-m", "accessory", "serve")
SETTINGS = ("--device", "cpu", "--dtype", "fp32", "--max_seq_len", "2000")


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config()
    folder = tmp_path_factory.mktemp("serve") / "small"
    return write_folder(folder, random_tensors(config, 5), config, files=2, tokenizer=small_tokenizer)


class Served:
    """A running server; ``get`` and ``post`` give None where nothing listens."""

    def __init__(self, program: Program, port: int, key: str | None) -> None:
        self.program = program
        self.url = f"http://127.0.0.1:{port}"
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def get(self, path: str) -> httpx.Response | None:
        try:
            return httpx.get(self.url + path, headers=self.headers, timeout=PATIENCE)
        except httpx.TransportError:
            return None

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=self.headers, timeout=PATIENCE)

    def is_ready(self) -> bool:
        answer = self.get("/health")
        return answer is not None and answer.status_code == 200


@contextmanager
def serving(
    folder: Path, *arguments: str, ranks: int = 2, environment: Mapping[str, str] | None = None, ready: bool = True
) -> Iterator[Served]:
    """The command with its ranks; nothing of it is left afterwards."""
    port = free_port()
    command = [*SERVE, folder, "--nproc", str(ranks), "--port", str(port), *SETTINGS, *arguments]
    with Program(command, environment) as program:
        served = Served(program, port, (environment or {}).get("ACCESSORY_API_KEY", "").strip() or None)
        if ready:
            program.wait_for(rf"serving small at http://127.0.0.1:{port}/v1")
            assert served.is_ready()
        yield served


def test_it_answers_and_ends_when_it_is_told_to(folder: Path) -> None:
    pages = ("--cors", "HTTPS://Example.org:443", "http://[::1]:3000")
    with serving(folder, *pages, environment={"ACCESSORY_API_KEY": "secret\n"}, ready=False) as served:
        program = served.program
        seen: list[int] = []
        while 200 not in seen:
            answer = served.get("/health")
            seen += [] if answer is None else [answer.status_code]
            assert program.process.poll() is None, program.text
            time.sleep(0.02)
        assert set(seen) == {503, 200}  # it listens, and says so, before the model is loaded
        assert served.post(prompt="The list", max_tokens=4, temperature=0).status_code == 200
        assert_error(httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"}), 401)
        for origin, status in (("https://example.org", 200), ("http://[::1]:3000", 200), ("https://example.com", 400)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = httpx.options(f"{served.url}/v1/completions", headers=asked)
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
        assert len(program.processes()) == 3
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            body = {"prompt": "a", "max_tokens": 1900, "temperature": 1, "stream": True, "seed": 1, "n": 4}
            with httpx.stream("POST", f"{served.url}/v1/completions", json=body, headers=served.headers) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(PATIENCE)
        program.send(signal.SIGTERM)
        assert program.wait() == 0
        program.wait_for_all()
        reader.join(PATIENCE)
        assert not reader.is_alive()
    last = [line for line in lines if line][-1].removeprefix("data: ")
    assert last == "[DONE]" or "shutting down" in json.loads(last)["error"]["message"]
    assert "secret" not in program.text
    assert "Traceback" not in program.text
    of_requests = [line for line in program.lines if re.match("[A-Z]+: [A-Z]+ /", line)]
    assert [line.split()[:3] for line in of_requests] == [["INFO:", "POST", "/v1/completions"]] * 3
    assert [line.split()[3] for line in of_requests[:2]] == ["200", "401"]


def test_a_dead_rank_is_said_and_ends_the_program(folder: Path) -> None:
    """And at --log-level warning nothing else is, by server and ranks."""
    with serving(folder, "--log-level", "warning", ready=False) as served:
        program = served.program
        wait_until(served.is_ready)
        assert served.post(prompt="a", max_tokens=1).status_code == 200
        assert program.lines == []
        failures: list[str] = []

        def ask() -> None:
            body = {"prompt": "a", "max_tokens": 1900, "temperature": 1, "stream": True, "seed": 1}
            with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=PATIENCE) as answer:
                failures.extend(line for line in answer.iter_lines() if "error" in line)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: "accessory_running_requests 1.0" in getattr(served.get("/metrics"), "text", ""))
        os.kill(program.rank(1), signal.SIGKILL)
        asking.join(PATIENCE)
        assert len(failures) == 1
        for answer in (served.get("/health"), served.post(prompt="a")):
            assert answer is not None
            assert_error(answer, 503, "rank")
        assert program.wait() == 1
        program.wait_for_all()
    assert len([line for line in program.lines if line.startswith("ERROR: ")]) == 1
    assert "Traceback" not in program.text


def test_with_restart_it_comes_back(folder: Path) -> None:
    with serving(folder, "--restart") as served:
        program = served.program
        expected = served.post(prompt="The list", max_tokens=4, temperature=0).json()["choices"]
        os.kill(program.rank(1), signal.SIGKILL)
        wait_until(lambda: not served.is_ready())
        wait_until(served.is_ready)
        assert served.post(prompt="The list", max_tokens=4, temperature=0).json()["choices"] == expected
        program.process.kill()  # nobody can end its ranks but they themselves
        program.process.wait()
        program.wait_for_all()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_can_be_told_to_end_while_it_loads(folder: Path, number: signal.Signals, code: int) -> None:
    with serving(folder, ranks=1, ready=False) as served:
        wait_until(lambda: served.get("/health") is not None)
        wait_until(lambda: len(served.program.processes()) == 2)
        served.program.send(number)
        assert served.program.wait() == code
        served.program.wait_for_all()
    assert "Traceback" not in served.program.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "program",
    ["serve", "chat", "generate --prompt a --nproc 2", "single_turn.py", "multi_turn.py", "multi_turn.py --n_gpus 2"],
)
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_said_first(
    program: str, device: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before a port is opened or a rank started."""

    def started(*arguments: object, **settings: object) -> None:
        raise AssertionError("too early")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(socket.socket, "bind", started)
    name, *more = program.split()
    if name.endswith(".py"):
        run = single_turn if name == "single_turn.py" else multi_turn
        code = run(["--pretrained_path", str(folder), *more, "--device", device])
    else:
        code = main([name, str(folder), *more, "--device", device])
    assert code == 1
    says = f"ERROR: the device {device} was asked for, but PyTorch sees no CUDA device: give the device cpu"
    assert capsys.readouterr().err.splitlines() == [says]


@pytest.mark.parametrize("restarts", [False, True])
def test_ranks_that_stay_lost_end_the_program(restarts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        """What is seen of an engine whose ranks are lost for good."""

        name, ready, failure, load = "lost", False, "rank 1 was killed", Load()
        closed = False

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(server, "SECONDS_TO_COME_BACK" if restarts else "SECONDS_OF_FAREWELL", 0.3)
    engine: Any = Lost()
    settings = ServerSettings(form=engine)  # nobody asks for it
    program = server.ApiServer(server.listen("127.0.0.1", 0), lambda: engine, settings, restarts=restarts)
    with pytest.raises(RankLost, match="rank 1 was killed"):
        program.run()
    assert engine.closed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--chat-template", "llama"),
            "'llama' is no file and unknown as a name: take a file or one of default, alpaca",
        ),
        (("--cors", "example.org"), "--cors 'example.org' is no origin: give a scheme and a host, such as https://ex"),
        (("--cors", "https://example.org/"), "is no origin"),
        (("--cors", "*", "https://example.org/page"), "--cors 'https://example.org/page' is no origin"),
        (("--cors", "https://user@example.org"), "is no origin"),
        (("--cors", "https://example.org:http"), "is no origin"),
        (("--cors", "https://*.example.org"), "is no origin"),
        (("--cors", "https://"), "is no origin"),
        (("--cors", "null"), "is no origin"),
        (("--cors", "https://example.org\n"), "is no origin"),
        (("--api-key", " "), "the API key is empty"),
        (("--api-key", "my secret"), "the API key holds spaces"),
        (("--body-limit", "0"), "--body-limit"),
        (("--host", "256.0.0.1"), "cannot listen at 256.0.0.1"),
        (("--device", "abacus"), "device 'abacus' is unknown: give cpu, cuda or cuda:N"),
    ],
)
def test_settings_that_make_no_sense(
    folder: Path, arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folder), *arguments]) == 1
    *logged, line = capsys.readouterr().err.splitlines()
    assert line.startswith("ERROR: ")
    assert says in line
    assert not [other for other in logged if "chats are put into the form" not in other]


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    done = run_command([*SERVE, tmp_path / "none", "--port", "0", *SETTINGS])
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("ERROR: ")
    assert str(tmp_path / "none") in errors[0]


def test_a_port_in_use_is_said_before_anything_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_command([*SERVE, folder, "--port", str(port)])
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr
    assert "loading" not in done.stderr
