"""The HTTP API in a thread of the test's process, beside an engine whose ranks are real processes."""

import threading
import time
from types import TracebackType
from typing import Any, Self

import httpx
import openai
import uvicorn
from patience import PATIENCE
from ranks import free_port

from accessory.serve.http.app import create_app
from accessory.serve.http.settings import ServerSettings
from accessory.serve.request import Engine


class ServedApi:
    """The API of an engine at a port of its own; `client` and `openai` speak to it.

    Attributes:
        app: the application; ``app.state.server`` is its state.
        url: of the server, without a path.
    """

    def __init__(self, engine: Engine | None, **settings: Any) -> None:
        self.engine: Any = engine
        self.settings = ServerSettings(**settings)
        self.app = create_app(engine, self.settings)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, host="127.0.0.1", port=self.port, http="h11", ws="none", lifespan="off", log_config=None
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="api")

    def __enter__(self) -> Self:
        self._thread.start()
        end = time.monotonic() + PATIENCE
        while not self._server.started:
            assert self._thread.is_alive(), "the server ended"
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.01)
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)
        key = self.settings.api_key or "none"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.openai.close()
        self.client.close()
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server did not end"

    def complete(self, **body: Any) -> httpx.Response:
        """POST /v1/completions."""
        return self.client.post("/v1/completions", json=body)

    def chat(self, **body: Any) -> httpx.Response:
        """POST /v1/chat/completions."""
        return self.client.post("/v1/chat/completions", json=body)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics, by its name and labels; 0 where it is not there."""
        for text in self.client.get("/metrics").text.splitlines():
            name, _, value = text.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0


def assert_error(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """An answer in OpenAI's form of an error, which says all ``words``; returns what it says."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["type"], str)
    for word in words:
        assert word in body["error"]["message"], body
    return body["error"]
