"""What every request passes before a route sees it: its key is checked, its body has a size and a form.

Plain ASGI: a body is read here, whole and bounded, so that no route waits for one or holds more than is allowed.
"""

import asyncio
import base64
import binascii
import hmac
from collections import deque
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from accessory.serve.http.docs import PATHS as PAGE_PATHS
from accessory.serve.http.errors import ApiError
from accessory.serve.http.generation import ClientGone

# What tells nothing of the model or its users: monitors need no key for it.
OPEN_PATHS = frozenset({"/health", "/metrics"})
# A body too large is read to its end before it is refused, or the client might never see why; but no further than this.
MOST_DISCARDED = 64 * 2**20
SECONDS_FOR_BODY = 60.0
_ASK_FOR_PASSWORD = 'Basic realm="accessory: the API key as password", charset="UTF-8"'


class Gate:
    """Refuses what has no key, is too large, too slow or no JSON; passes the rest on with its body.

    Args:
        key: what clients must send; None lets everyone in.
        limit: bytes of a body at most.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, limit: int) -> None:
        self._app, self._key, self._limit = app, None if key is None else key.encode(), limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        page = scope["path"] in PAGE_PATHS and scope["method"] in ("GET", "HEAD")
        if scope["path"] not in OPEN_PATHS and not self._knows_key(headers, page=page):
            return await _without_key(page=page)(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._body(headers, receive), SECONDS_FOR_BODY)
            if body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(415, "the body must be JSON, sent with Content-Type: application/json")
        except TimeoutError:
            error = ApiError(408, f"the body did not arrive within {SECONDS_FOR_BODY:g} s")
            return await error.response()(scope, receive, send)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        await self._app(scope, _with_body(body, receive), send)

    def _knows_key(self, headers: Headers, *, page: bool) -> bool:
        """Whether a request comes with the key.

        Args:
            page: it may also come as the password of HTTP's Basic scheme, the one way that a browser has when a page
                is opened. A browser sends that with whatever any page asks of this host, so it counts nowhere else.
        """
        if self._key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Headers are decoded from latin-1, which gives the bytes back as they came.
        as_sent = given.strip().encode("latin-1")
        if page and scheme.lower() == "basic":
            sent = _password(as_sent)
        else:
            sent = as_sent if scheme.lower() == "bearer" else None
        return sent is not None and hmac.compare_digest(sent, self._key)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            ApiError: it is too large.
            ClientGone: the connection was dropped.
        """
        refusal = ApiError(413, f"the body is larger than {self._limit} bytes", code="body_too_large")
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit and "expect" in headers:
            raise refusal  # the client waits for a word before it sends anything
        parts: list[bytes] = []
        size = 0
        while True:
            message: dict[str, Any] = dict(await receive())
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size <= self._limit:
                parts.append(part)
            else:
                parts.clear()
            if size > MOST_DISCARDED or not message.get("more_body", False):
                break
        if size > self._limit:
            raise refusal
        return b"".join(parts)


def _password(credentials: bytes) -> bytes | None:
    """That of HTTP's Basic scheme; None where it cannot be read."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return None


def _without_key(*, page: bool) -> Response:
    """What is answered without the key, at a page's path so that a browser asks for a password."""
    message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
    if page:
        message += ", or as the password of any user"
    error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    answer = error.response()
    if page:
        # On a line of its own: browsers read one scheme of a line.
        answer.headers.append("WWW-Authenticate", _ASK_FOR_PASSWORD)
    return answer


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Give the body in one piece, and then what follows it."""
    messages = deque([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return messages.popleft() if messages else await receive()

    return replay
