"""What every request passes before a route sees it: it is counted, its key is checked, its body has a size and a form.

Plain ASGI: a body is read here, whole and bounded, so that no route waits for one or holds more than is allowed.
"""

import asyncio
import hmac
import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from accessory.serve.http.errors import ApiError
from accessory.serve.http.generation import ClientGone
from accessory.serve.http.metrics import Metrics

# What tells nothing of the model or its users: monitors need no key for it.
OPEN_PATHS = frozenset({"/health", "/metrics"})
# A body too large is read to its end before it is refused, or the client might never see why; but no further than this.
MOST_DISCARDED = 64 * 2**20
SECONDS_FOR_BODY = 60.0
CLIENT_LEFT = 499


class Counted:
    """Counts requests by path and status.

    Args:
        paths: those of the routes, with names in braces for what varies. Others are counted together: whoever asks
            for them must not make up labels.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app, self._metrics = app, metrics
        self._paths = [(re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(path))), path) for path in paths]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = next((name for pattern, name in self._paths if pattern.fullmatch(scope["path"])), "other")
        counted = False

        async def note(message: Message) -> None:
            nonlocal counted
            if message["type"] == "http.response.start":
                counted = True
                self._metrics.count_request(path, message["status"])
            await send(message)

        unanswered = CLIENT_LEFT
        try:
            with suppress(ClientGone):
                await self._app(scope, receive, note)
        except Exception:
            unanswered = 500  # whoever is outside says so
            raise
        finally:
            if not counted:
                self._metrics.count_request(path, unanswered)


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
        try:
            self._check_key(scope, headers)
            body = await asyncio.wait_for(self._body(headers, receive), SECONDS_FOR_BODY)
            if body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(415, "the body must be JSON, sent with Content-Type: application/json")
        except TimeoutError:
            error = ApiError(408, f"the body did not arrive within {SECONDS_FOR_BODY:g} s")
            return await error.response()(scope, receive, send)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        await self._app(scope, _with_body(body, receive), send)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Headers are decoded from latin-1, which gives the bytes back as they came.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

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


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Give the body in one piece, and then what follows it."""
    messages = deque([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return messages.popleft() if messages else await receive()

    return replay
