"""What the API refuses: in OpenAI's form, with the status that its clients expect, never by a mistake of its own."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from http_api import ServedApi, assert_error
from patience import PATIENCE, wait_until

from accessory.generation.sampling import Sampling
from accessory.serve.driver import Driver

JSON = {"content-type": "application/json"}
ONWARD = {"continue_final_message": True, "add_generation_prompt": False}
MESSAGES = [{"role": "user", "content": "Hi"}]
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def locked(tiny_engine: Driver) -> Iterator[ServedApi]:
    with ServedApi(tiny_engine, api_key="caf\u00e9-7") as api:
        yield api


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt", "at least 1"),
        ({"prompt": ["a", 5]}, "prompt", "string"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": [10**6]}, "prompt", "vocabulary's are 0 to"),
        ({"prompt": [10**400]}, "prompt", "vocabulary's are 0 to"),
        ({"prompt": [True]}, "prompt", "integer"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": ["a"] * 3000}, "prompt", "2048"),
        ({"prompt": ["a"] * 100, "n": 100}, "n", "2048"),
        ({"prompt": [[5] * 100] * 16, "n": 128, "echo": True, "logprobs": 20}, "logprobs", "4300800 scores"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "set echo to true"),
        ({"prompt": "a", "max_tokens": 0, "echo": False}, "max_tokens", "set echo to true"),
        ({"prompt": [1] * 129, "max_tokens": 0, "echo": True}, "prompt", "the prompt's 129 with 0 of the answer"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "integer"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "integer"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "integer"),
        ({"prompt": "a", "max_tokens": 10**400}, "prompt", "context is 128 tokens"),
        ({"prompt": "a", "max_tokens": 127}, "prompt", "context is 128 tokens, and the prompt's 2 with 127"),
        ({"prompt": "a " * 200}, "prompt", "context is 128 tokens, and the prompt's 202"),
        ({"prompt": "a" * 20_000}, "prompt", "20000 characters"),
        ({"prompt": [1] * 128}, "prompt", "the prompt's 128 with at least 1"),
        ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "temperature": 3}, "temperature", "less than or equal to 2"),
        ({"prompt": "a", "top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "a", "n": 1000}, "n", "128"),
        ({"prompt": "a", "stop": ""}, "stop", "at least 1 character"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop", "at least 1 character"),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop", "16"),
        ({"prompt": "a", "seed": 2**63}, "seed", "less than"),
        ({"prompt": "a", "seed": "x"}, "seed", "integer"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "20"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "a", "best_of": 3}, "best_of", "every answer"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not support"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "not support"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "not support"),
        ({"prompt": "a", "frequency_penalty": -0.5}, "frequency_penalty", "not support"),
        ({"prompt": "a", "top_k": 5}, "top_k", "unknown parameter"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ([], None, "JSON object"),
        ("a", None, "JSON object"),
        (None, None, "JSON object"),
    ],
)
def test_completions_that_make_no_sense(api: ServedApi, body: Any, param: str | None, says: str) -> None:
    answer = api.client.post("/v1/completions", content=json.dumps(body), headers=JSON)
    assert assert_error(answer, 400, says)["param"] == param


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "messages", "missing"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "string"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'assistant'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "must be from the user"),
        ({"messages": [*MESSAGES, {"role": "system", "content": "a"}, *MESSAGES]}, "messages", "before all others"),
        ({"messages": MESSAGES * 200}, "messages", "messages, more than this model's context of 128 tokens"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages", "surrogate"),
        ({"messages": [{"role": "user", "content": "a" * 20_000}]}, "messages", "20000 characters"),
        ({"messages": [{"role": "user", "content": "a " * 200}]}, "messages", "context is 128 tokens"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
            "parts of type image_url",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]},
            "messages.0.content.0",
            "parts of type refusal",
        ),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages", "valid dictionary"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "at least 1"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": None}]}, "messages", "string"),
        ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "messages.0.name", "string"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]}, "messages", "set continue_final_message"),
        ({"messages": MESSAGES, **ONWARD}, "messages", "must be from the assistant"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message", "begins another"),
        (
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "set add_generation_prompt to false",
        ),
        ({"messages": MESSAGES, "add_generation_prompt": "no"}, "add_generation_prompt", "boolean"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template", "see --chat-template"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "see --chat-template"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens", "its own special tokens"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "not support"),
        ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice", "not support"),
        ({"messages": MESSAGES, "functions": [{}]}, "functions", "not support"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "not support"),
        ({"messages": MESSAGES, "logit_bias": {"1": 1}}, "logit_bias", "not support"),
        ({"messages": MESSAGES, "presence_penalty": 1}, "presence_penalty", "not support"),
        ({"messages": MESSAGES, "modalities": ["audio"]}, "modalities", "not support"),
        ({"messages": MESSAGES, "reasoning_effort": "high"}, "reasoning_effort", "not support"),
        ({"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs", "logprobs to true"),
        ({"messages": MESSAGES, "logprobs": 3}, "logprobs", "boolean"),
    ],
)
def test_chats_that_make_no_sense(api: ServedApi, body: Any, param: str | None, says: str) -> None:
    answer = api.client.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert assert_error(answer, 400, says)["param"] == param


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "JSON object"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "temperature": NaN}', "finite"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite"),
        (b'{"prompt": [' + b"9" * 5000 + b"]}", "no JSON that can be read"),
        (b'{"prompt": ' + b'["a", 1' + b", {}" * 100_000 + b"]}", "string"),
    ],
)
def test_bodies_that_are_no_json(api: ServedApi, content: bytes, says: str) -> None:
    assert_error(api.client.post("/v1/completions", content=content, headers=JSON), 400, says)


def test_a_body_of_another_type(api: ServedApi) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = api.client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert_error(answer, 415, "Content-Type: application/json")


def test_tokens_that_make_no_sense(api: ServedApi) -> None:
    for body, says in (
        ({"tokens": [10**6]}, "vocabulary's are 0 to"),
        ({"tokens": [5] * 5000 + [-1]}, "greater than or equal to 0"),
        ({"tokens": [5] * 5000 + [10**6]}, "vocabulary's are 0 to"),
        ({"tokens": "a"}, "list"),
        ({}, "missing"),
    ):
        assert_error(api.client.post("/detokenize", json=body), 400, says)
    for body, param, says in (
        ({"prompt": 5}, "prompt", "string"),
        ({}, "prompt", "either prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt", "either prompt"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens", "its own special tokens"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message", "begins another"),
        ({"messages": MESSAGES, **ONWARD}, "messages", "must be from the assistant"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
    ):
        answer = api.client.post("/tokenize", content=json.dumps(body), headers=JSON)
        assert assert_error(answer, 400, says)["param"] == param
    assert len(api.client.post("/tokenize", json={"prompt": "a " * 5000}).json()["tokens"]) > 5000


def test_an_unknown_model(api: ServedApi) -> None:
    for name in ("gpt-4", "", "\ud800"):
        body = json.dumps({"prompt": "a", "model": name})
        answer = api.client.post("/v1/completions", content=body, headers=JSON)
        assert assert_error(answer, 404)["code"] == "model_not_found"
    assert_error(api.chat(messages=MESSAGES, model="gpt-4"), 404, "'gpt-4'")
    assert_error(api.client.get("/v1/models/gpt-4"), 404, "'gpt-4'")


def test_paths_and_methods_that_are_not_there(api: ServedApi) -> None:
    for path in ("/", "/v1", "/v1/embeddings", "/docs/", "/redoc", "/%ff"):
        assert_error(api.client.get(path), 404, "nothing at GET")
    answer = api.client.get("/v1/completions")
    assert_error(answer, 405, "takes no GET")
    assert answer.headers["allow"] == "POST"
    assert_error(api.client.delete("/v1/models"), 405, "takes no DELETE")


def test_the_openapi_page_promises_no_other_status(api: ServedApi) -> None:
    page = api.client.get("/openapi.json")
    assert page.status_code == 200
    assert "422" not in {
        status for path in page.json()["paths"].values() for op in path.values() for status in op["responses"]
    }


def test_the_official_client_raises_its_own_errors(api: ServedApi, locked: ServedApi) -> None:
    name = api.app.state.server.name
    with pytest.raises(openai.BadRequestError) as refused:
        api.openai.completions.create(model=name, prompt="a", max_tokens=0)
    assert refused.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        api.openai.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    stranger = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as unknown:
        stranger.models.list()
    assert unknown.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer wrong",
        "Bearer caf\u00e9-7x".encode(),
        "Bearer caf\u00e9-".encode(),
        "Basic caf\u00e9-7".encode(),
        b"Bearer caf\xe9-7",
        "caf\u00e9-7".encode(),
    ],
)
def test_a_wrong_key(locked: ServedApi, header: bytes | None) -> None:
    headers = {} if header is None else {"authorization": header}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/openapi.json"), ("GET", "/x")):
        answer = locked.client.request(method, path, headers=headers)
        assert assert_error(answer, 401, "API key")["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_the_right_key(locked: ServedApi) -> None:
    headers = {"authorization": "bearer caf\u00e9-7".encode()}
    assert locked.client.get("/v1/models", headers=headers).status_code == 200
    for path in ("/health", "/metrics"):
        assert locked.client.get(path).status_code == 200
    assert "caf" not in repr(locked.settings)


def body_of(size: int) -> bytes:
    return b'{"prompt": "' + b"a" * (size - 14) + b'"}'


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_beyond_the_limit(api: ServedApi, chunked: bool) -> None:
    for size, status in ((4 * MEGABYTE, 400), (4 * MEGABYTE + 1, 413), (10 * MEGABYTE, 413)):
        body = body_of(size)
        parts = (body[at : at + 65536] for at in range(0, size, 65536))
        answer = api.client.post("/v1/completions", content=parts if chunked else body, headers=JSON)
        assert_error(answer, status, "4194304 bytes" if status == 413 else "characters")


def test_a_client_that_asks_before_it_sends_is_told_at_once(api: ServedApi) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", api.port), timeout=PATIENCE) as connection:
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_too_many_requests(tiny_engine: Driver, api: ServedApi) -> None:
    """4 run and 8 wait; the next is told to come again, and those before it are answered."""
    sampling = Sampling(max_gen_len=100, temperature=1.5, top_p=1.0)
    streams = [tiny_engine.submit([1, 5], sampling, seed=number) for number in range(12)]
    try:
        answer = api.complete(prompt="a")
        assert assert_error(answer, 429, "are waiting already")["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        assert_error(api.complete(prompt="a", stream=True), 429)
        with pytest.raises(openai.RateLimitError):
            api.openai.completions.create(model=tiny_engine.name, prompt="a")
        wait_until(lambda: api.metric("accessory_waiting_requests") >= 1)
    finally:
        cancelled = tiny_engine.load.cancelled
        for stream in streams:
            stream.cancel()
        wait_until(lambda: tiny_engine.load.cancelled == cancelled + 12)
    assert api.complete(prompt="a").status_code == 200


def test_before_the_model_is_loaded(tiny_engine: Driver) -> None:
    with ServedApi(None) as api:
        for answer in (
            api.client.get("/health"),
            api.client.get("/v1/models"),
            api.complete(prompt="a"),
            api.chat(messages=MESSAGES, stream=True),
            api.client.post("/tokenize", json={"prompt": "a"}),
        ):
            assert_error(answer, 503, "being loaded")
            assert "retry-after" in answer.headers
        assert api.metric("accessory_ready") == 0
        assert api.metric("accessory_slots") == 0
        api.app.state.server.load(tiny_engine)
        assert api.client.get("/health").json() == {"status": "ok"}
        assert api.complete(prompt="a").status_code == 200


def test_an_answer_that_is_cut_off_by_the_servers_end_says_so(tiny_engine: Driver) -> None:
    with ServedApi(tiny_engine) as api:
        body = {"prompt": "a", "max_tokens": 100, "stream": True, "temperature": 1.5}
        with api.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            state = api.app.state.server
            loop = next(iter(state.generations._open))._loop
            loop.call_soon_threadsafe(state.generations.close, "the server is shutting down")
            rest = [line for line in lines if line]
        assert "shutting down" in json.loads(rest[-1].removeprefix("data: "))["error"]["message"]
        assert_error(api.complete(prompt="a"), 503, "shutting down")
    wait_until(lambda: tiny_engine.load.running == 0)


def test_what_nobody_foresaw_tells_nothing(tiny_engine: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a secret")

    with ServedApi(tiny_engine) as api:
        monkeypatch.setattr(Driver, "submit", broken)
        answer = httpx.post(f"{api.url}/v1/completions", json={"prompt": "a"})
        assert "secret" not in assert_error(answer, 500)["message"]
        assert api.metric('accessory_requests_total{endpoint="/v1/completions",status="500"}') == 1


PAGE, OTHER = "https://example.org", "https://elsewhere.example"


def preflight(
    api: ServedApi, path: str = "/v1/chat/completions", origin: str = PAGE, method: str = "POST"
) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return api.client.options(path, headers=headers)


def test_pages_of_other_origins_get_nothing_unless_told(api: ServedApi) -> None:
    for answer in (
        preflight(api),
        api.client.get("/v1/models", headers={"Origin": PAGE}),
        api.client.get("/x", headers={"Origin": PAGE}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control-") or name == "vary"]
    assert_error(preflight(api), 405, "takes no OPTIONS")


@pytest.fixture(scope="module")
def visited(tiny_engine: Driver) -> Iterator[ServedApi]:
    with ServedApi(tiny_engine, api_key="k", body_limit=1000, origins=(PAGE, "http://localhost:3000")) as api:
        yield api


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
def test_a_browser_may_ask_before_it_has_a_key(visited: ServedApi, origin: str) -> None:
    for path in ("/v1/chat/completions", "/v1/models", "/health"):
        answer = preflight(visited, path, origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-allow-methods"] == "GET, POST, OPTIONS"
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-lang"
        assert int(answer.headers["access-control-max-age"]) > 0
        assert "Origin" in answer.headers["vary"]
        assert "access-control-allow-credentials" not in answer.headers


def test_other_pages_may_not(visited: ServedApi) -> None:
    for origin in (OTHER, "null", PAGE + ":444", "http://example.org", PAGE + ".evil.example"):
        refused = preflight(visited, origin=origin)
        assert refused.status_code == 400
        answer = visited.client.get("/health", headers={"Origin": origin})
        assert answer.status_code == 200
        for one in (refused, answer):
            assert "access-control-allow-origin" not in one.headers
            assert "Origin" in one.headers["vary"]
    assert preflight(visited, method="DELETE").status_code == 400
    assert_error(visited.client.options("/v1/models", headers={"Authorization": "Bearer k"}), 405, "takes no OPTIONS")


def test_a_page_may_read_every_answer(visited: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"Origin": PAGE, "Authorization": "Bearer k"}

    def ask(status: int, method: str, path: str, **more: Any) -> httpx.Response:
        answer = visited.client.request(method, path, **{"headers": headers, **more})
        assert answer.status_code == status, answer.text
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-expose-headers"] == "Retry-After"
        assert answer.headers["vary"] == "Origin"
        return answer

    ask(200, "GET", "/v1/models")
    ask(200, "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 2})
    stream = ask(200, "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
    assert stream.text.endswith("data: [DONE]\n\n")
    ask(400, "POST", "/v1/completions", json={})
    ask(401, "GET", "/v1/models", headers={"Origin": PAGE})
    ask(404, "GET", "/x")
    ask(405, "GET", "/v1/completions")
    ask(413, "POST", "/v1/completions", json={"prompt": "a" * 1000})
    ask(415, "POST", "/v1/completions", content=b"a")

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(Driver, "submit", broken)
    assert_error(ask(500, "POST", "/v1/completions", json={"prompt": "a"}), 500)


def test_any_page_where_the_operator_says_so() -> None:
    with ServedApi(None, origins=("*",)) as api:
        assert preflight(api, origin=OTHER).headers["access-control-allow-origin"] == "*"
        answer = api.client.get("/v1/models", headers={"Origin": OTHER})
        assert_error(answer, 503, "being loaded")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
