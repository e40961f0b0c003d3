"""One line of the server's log for each request: what was asked, how it ended, what it took; and nothing private."""

import logging
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_api import ServedApi
from patience import PATIENCE, wait_until

from accessory.serve.driver import Driver
from accessory.serve.http import access
from accessory.serve.request import RankLost

KEY = "secret-key"
LINE = re.compile(
    r"(?P<method>\S+) (?P<path>\S+) (?P<status>\d{3})"
    r"(?: prompt_tokens=(?P<read>\d+) completion_tokens=(?P<written>\d+))? seconds=(?P<seconds>\d+\.\d{3})"
)
WORDS = "a text that is nobody else's affair"


class Log(logging.Handler):
    """Lines and their levels as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))

    def next(self) -> dict[str, str | None]:
        """The one line that has come since, which may come a little after the answer."""
        wait_until(lambda: self.lines)
        ((level, text),) = self.lines
        self.lines.clear()
        found = LINE.fullmatch(text)
        assert found is not None, text
        return {**found.groupdict(), "level": logging.getLevelName(level)}


@pytest.fixture
def log() -> Iterator[Log]:
    handler, level = Log(), access.logger.level
    access.logger.addHandler(handler)
    access.logger.setLevel(logging.DEBUG)
    yield handler
    access.logger.removeHandler(handler)
    access.logger.setLevel(level)


@pytest.fixture(scope="module")
def locked(tiny_engine: Driver) -> Iterator[ServedApi]:
    with ServedApi(tiny_engine, api_key=KEY) as api:
        api.client.headers["Authorization"] = f"Bearer {KEY}"
        yield api


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_with_its_tokens(locked: ServedApi, log: Log, chat: bool, stream: bool) -> None:
    """Of several prompts together, each counted once, as in the answer's own usage."""
    body: dict[str, Any] = {"max_tokens": 5, "n": 2, "stream": stream}
    if chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": WORDS}]
    else:
        path = "/v1/completions"
        body["prompt"] = [WORDS, "The list"]
    usage = locked.client.post(path, json={**body, "stream": False, "temperature": 0}).json()["usage"]
    log.next()
    answer = locked.client.post(path, json={**body, "temperature": 0})
    assert answer.status_code == 200
    line = log.next()
    assert (line["level"], line["method"], line["path"], line["status"]) == ("INFO", "POST", path, "200")
    assert (line["read"], line["written"]) == (str(usage["prompt_tokens"]), str(usage["completion_tokens"]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(locked: ServedApi, log: Log, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 120, "n": 50, "temperature": 1.5, "stream": stream}
    if stream:
        with locked.client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            locked.client.post("/v1/completions", json=body, timeout=0.3)
    line = log.next()
    assert (line["status"], line["read"]) == ("499", "2")
    assert 0 < int(line["written"] or 0) < 50 * 120 or not stream


def test_requests_that_are_refused(locked: ServedApi, log: Log) -> None:
    for status, method, path, more in (
        (401, "GET", "/v1/models", {"headers": {"Authorization": "Bearer wrong"}}),
        (401, "GET", "/docs", {"headers": {"Authorization": ""}}),
        (404, "GET", "/v1/models/gpt-4", {}),
        (404, "PATCH", "/x", {}),
        (405, "GET", "/v1/completions", {}),
        (400, "POST", "/v1/completions", {"json": {"prompt": WORDS, "top_k": 5}}),
        (415, "POST", "/v1/completions", {"content": b"a"}),
        (413, "POST", "/v1/completions", {"content": b"a" * (4 * 2**20 + 1)}),
    ):
        assert locked.client.request(method, path, **more).status_code == status  # type: ignore[arg-type]
        line = log.next()
        assert (line["level"], line["method"], line["path"], line["status"]) == ("INFO", method, path, str(status))
        assert line["read"] is None


def test_monitors_do_not_fill_the_log(locked: ServedApi, log: Log) -> None:
    for path in ("/health", "/metrics"):
        assert locked.client.get(path).status_code == 200
        assert log.next()["level"] == "DEBUG"
        access.logger.setLevel(logging.INFO)
        locked.client.get(path)
        assert locked.client.get("/v1/models").status_code == 200
        assert log.next()["path"] == "/v1/models"
        access.logger.setLevel(logging.DEBUG)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("/v1/models?api_key=hidden", "/v1/models"),
        ("/x%0AINFO:%20GET%20/forged%20200", "/x%0AINFO:%20GET%20/forged%20200"),
        ("/%1b[2J%00%7f%c2%85", "/%1B%5B2J%00%7F%C2%85"),
        ("/%ff%e2%80%ae", "/%EF%BF%BD%E2%80%AE"),
        ("/" + "a" * 5000, "/" + "a" * 119 + "..."),
        ("/" + "%0A" * 5000, "/" + ("%0A" * 40)[:119] + "..."),
    ],
)
def test_what_a_client_wrote_forges_no_line(locked: ServedApi, log: Log, asked: str, shown: str) -> None:
    request = f"GET {asked} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked.port), timeout=PATIENCE) as connection:
        connection.sendall(request.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 ")
    line = log.next()
    assert line["path"] == shown


def test_a_method_of_a_clients_own(locked: ServedApi, log: Log) -> None:
    assert locked.client.request("A" * 100, "/x").status_code == 404
    assert log.next()["method"] == "A" * 16 + "..."


def test_nothing_private_is_in_it(locked: ServedApi, log: Log) -> None:
    locked.complete(prompt=WORDS, max_tokens=2)
    locked.chat(messages=[{"role": "user", "content": WORDS}], max_tokens=2)
    locked.client.get("/x", params={"api_key": KEY}, headers={"Authorization": "Basic " + KEY})
    wait_until(lambda: len(log.lines) == 3)
    text = "\n".join(line for _, line in log.lines)
    assert not [word for word in (KEY, WORDS, "api_key", "?", "earer") if word in text]


def test_what_ends_by_the_servers_fault(tiny_engine: Driver, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has told its client 200 by then: the log says what became of it."""
    submit = Driver.submit

    def lost(self: Driver, *args: Any, on_event: Any, **settings: Any) -> Any:
        stream = submit(self, *args, on_event=lambda event: None, **settings)
        on_event(RankLost("rank 1 was killed"))
        return stream

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("unforeseen")

    with ServedApi(tiny_engine) as api:
        for fault, stream, status, logged in (
            (lost, True, 200, "503"),
            (lost, False, 503, "503"),
            (broken, False, 500, "500"),
            (broken, True, 500, "500"),
        ):
            monkeypatch.setattr(Driver, "submit", fault)
            # A connection of its own: the server closes one behind such an answer.
            answer = httpx.post(f"{api.url}/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": stream})
            assert answer.status_code == status
            line = log.next()
            assert (line["status"], line["read"], line["written"]) == (logged, "2", "0")
    wait_until(lambda: tiny_engine.load.running == 0)
