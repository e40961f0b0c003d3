"""GET /docs: the page of the API, whole without any other host, and behind the key where there is one."""

import base64
import http.client
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from browser import chromium, keep, needs_chromium
from http_api import ServedApi, assert_error
from patience import PATIENCE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

KEY = "caf\u00e9-7"
PAGE = "/docs"
ASSETS = ("/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css")
OPEN = ("/health", "/metrics")


@pytest.fixture(scope="module")
def free() -> Iterator[ServedApi]:
    """A server whose model is still being loaded: its page is there."""
    with ServedApi(None) as api:
        yield api


@pytest.fixture(scope="module")
def locked() -> Iterator[ServedApi]:
    with ServedApi(None, api_key=KEY) as api:
        yield api


@pytest.fixture(scope="module")
def spoken() -> Iterator[ServedApi]:
    """With a key of which a script can make a header: that takes no other letters."""
    with ServedApi(None, api_key="cafe-7") as api:
        yield api


def basic(password: str, user: str = "anyone") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_the_page_and_all_that_it_loads_come_from_this_server(free: ServedApi) -> None:
    page = free.client.get(PAGE)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in re.sub(r"<!--.*?-->", "", page.text, flags=re.DOTALL)
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {str(httpx.URL(PAGE).join(address)) for address in loaded} == {*ASSETS, "data:,"}
    for path in ASSETS:
        answer = free.client.get(path)
        assert answer.status_code == 200
        assert len(answer.content) > 100_000
    assert '"validatorUrl": null' in page.text
    assert "'self'" in page.headers["content-security-policy"]
    paths = free.client.get("/openapi.json").json()
    assert "security" not in paths
    assert not [path for path in paths["paths"] if path.startswith(PAGE)]


def test_methods_of_the_page(free: ServedApi) -> None:
    for path in (PAGE, *ASSETS, "/openapi.json"):
        head = free.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(free.client.get(path).content))
        assert_error(free.client.post(path, json={}), 405, f"{path} takes no POST")
    assert_error(free.client.get("/docs/redoc.standalone.js"), 404)


def test_the_page_is_counted(free: ServedApi) -> None:
    for path in (PAGE, *ASSETS):
        line = f'accessory_requests_total{{endpoint="{path}",status="200"}}'
        before = free.metric(line)
        free.client.get(path)
        assert free.metric(line) == before + 1


def test_a_browser_is_asked_for_the_key(locked: ServedApi) -> None:
    wrong: tuple[dict[str, str], ...] = (
        {},
        basic("wrong"),
        basic(""),
        basic(KEY + "x"),
        basic("", user=KEY),
        {"Authorization": "Basic"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(KEY.encode()).decode()},
        {"Authorization": "Bearer wrong"},
    )
    for path in (PAGE, *ASSETS, "/openapi.json"):
        for headers in wrong:
            answer = locked.client.get(path, headers=headers)
            assert assert_error(answer, 401, "password")["code"] == "invalid_api_key"
            schemes = answer.headers.get_list("www-authenticate")
            assert [scheme.split(" ")[0] for scheme in schemes] == ["Bearer", "Basic"]
            assert 'realm="' in schemes[1]
        for right in (basic(KEY), basic(KEY, user=""), {"Authorization": f"Bearer {KEY}".encode()}):
            for method in ("GET", "HEAD"):
                assert locked.client.request(method, path, headers=right).status_code == 200  # type: ignore[arg-type]


def test_a_password_opens_nothing_else(locked: ServedApi) -> None:
    """A browser sends it along with whatever another's page asks of this host."""
    asked = [(method, path) for path, methods in paths_of(locked).items() if path not in OPEN for method in methods]
    asked += [("POST", PAGE), ("DELETE", "/openapi.json"), ("OPTIONS", PAGE), ("GET", "/x"), ("GET", "/docs/x")]
    assert ("POST", "/v1/completions") in asked
    for method, path in asked:
        answer = locked.client.request(method, path, headers=basic(KEY), json={} if method == "POST" else None)
        assert_error(answer, 401, "Bearer KEY")
        assert answer.headers.get_list("www-authenticate") == ["Bearer"]


@pytest.mark.parametrize(
    "path",
    [
        "/docs/../v1/models",
        "/docs/..%2fv1/models",
        "/docs%2f..%2fv1%2fmodels",
        "/docs/%2e%2e/v1/models",
        "//docs",
        "/docs/",
        "/docs//swagger-ui.css",
        "/docs/../docs",
        "/docs;/v1/models",
        "/docs%00",
        "/DOCS",
        "/v1/models/docs",
        "/v1/models//docs",
        "/v1/models?/docs",
        "/docs/swagger-ui.css/../../v1/models",
        "/health/../v1/models",
    ],
)
def test_no_way_around_the_gate(locked: ServedApi, path: str) -> None:
    """As they are sent: clients tidy a path up before they ask."""
    assert raw_status(locked, path, {}) == raw_status(locked, path, basic(KEY)) == 401
    assert raw_status(locked, path, {"Authorization": f"Bearer {KEY}".encode()}) in (404, 503)


def test_the_page_in_its_other_spellings(locked: ServedApi) -> None:
    for path in ("/%64ocs", "/docs?x=/v1/models"):
        assert raw_status(locked, path, {}) == 401
        assert raw_status(locked, path, basic(KEY)) == 200


def raw_status(api: ServedApi, path: str, headers: dict[str, Any]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=PATIENCE)
    try:
        connection.putrequest("GET", path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def paths_of(api: ServedApi) -> dict[str, list[str]]:
    page = api.client.get("/openapi.json", headers=basic(api.settings.api_key or "")).json()
    return {path: [method.upper() for method in methods] for path, methods in page["paths"].items()}


def test_the_openapi_page_says_that_a_key_is_wanted(locked: ServedApi) -> None:
    page = locked.client.get("/openapi.json", headers=basic(KEY)).json()
    (name,) = page["components"]["securitySchemes"]
    assert page["components"]["securitySchemes"][name] == {"type": "http", "scheme": "bearer"}
    assert page["security"] == [{name: []}]
    own = {path: op.get("security") for path, ops in page["paths"].items() for op in ops.values()}
    assert {path for path, security in own.items() if security == []} == set(OPEN)
    assert all(security in (None, []) for security in own.values())
    assert KEY not in json.dumps(page, ensure_ascii=False)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with chromium() as running:
        yield running


@needs_chromium
def test_in_a_browser_with_a_key(browser: "Browser", spoken: ServedApi) -> None:
    """Under a name of its own, since Swagger UI behaves otherwise at localhost; what asks for another gets nothing."""
    key = spoken.settings.api_key
    assert key is not None
    asked: list[str] = []
    said: list[str] = []
    sent: list[dict[str, str]] = []

    def answer(route: "Route") -> None:
        request = route.request
        asked.append(request.url)
        if not request.url.startswith("http://model.test/"):
            return route.abort()
        path = request.url.removeprefix("http://model.test")
        if path.startswith("/v1/"):
            sent.append(request.headers)
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        if "authorization" not in headers:
            headers |= basic(key)  # as the browser does once it has been told
        found = spoken.client.request(request.method, path, headers=headers, content=request.post_data_buffer)
        route.fulfill(status=found.status_code, headers=dict(found.headers), body=found.content)

    with browser.new_context() as context:
        context.route("**/*", answer)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto("http://model.test/docs")
        page.locator(".opblock").first.wait_for()
        shown = {
            (block.get_attribute("class") or "").split("opblock-")[-1].split()[0].upper()
            + " "
            + block.locator(".opblock-summary-path").get_attribute("data-path")  # type: ignore[operator]
            for block in page.locator(".opblock").all()
        }
        assert shown == {f"{method} {path}" for path, methods in paths_of(spoken).items() for method in methods}
        keep(page, "docs")
        assert not said
        page.get_by_role("button", name="Authorize").first.click()
        page.locator(".auth-container input").fill(key)
        page.locator(".auth-container .authorize[type=submit]").click()
        page.locator(".auth-container .btn-done").click()
        block = page.locator(".opblock", has=page.locator('[data-path="/v1/models"]')).first
        block.click()
        block.get_by_role("button", name="Try it out").click()
        block.get_by_role("button", name="Execute").click()
        block.locator(".live-responses-table .response-col_status", has_text="503").wait_for()
    assert sent
    assert sent[-1]["authorization"] == f"Bearer {key}"
    assert {httpx.URL(url).host for url in asked if not url.startswith("data:")} == {"model.test"}


@needs_chromium
def test_a_browser_asks_for_a_password(browser: "Browser", locked: ServedApi) -> None:
    """The challenge is one that a browser understands, and it sends the key also with what the page loads."""
    refused: list[int] = []
    with browser.new_context(http_credentials={"username": "anyone", "password": KEY}) as context:
        page = context.new_page()
        page.on("response", lambda answer: refused.append(answer.status) if answer.status >= 400 else None)
        page.goto(locked.url + PAGE)
        page.locator(".opblock").first.wait_for()
    assert set(refused) <= {401}
