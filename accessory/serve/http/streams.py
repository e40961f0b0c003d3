"""Server-sent events: a JSON object for each part of an answer, and [DONE] at the end."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from accessory.serve.http.errors import ApiError, fault
from accessory.serve.http.generation import ClientGone, Generation, unless_gone

logger = logging.getLogger(__name__)


class EventStream(Response):
    """Sends the parts of an answer while they are written; ends the generation when the client leaves.

    Args:
        parts: JSON objects, made of ``generation``'s events. Where it raises, the client gets the error as a last
            part, and no [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, parts: AsyncIterator[dict[str, Any]]) -> None:
        # Proxies are asked to pass on every part at once.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation, self._parts = generation, parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await unless_gone(Request(scope, receive), lambda: self._send_all(send))
        finally:
            self._generation.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._data():
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _data(self) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self._parts) as parts:  # type: ignore[type-var]  # it is a generator
                async for part in parts:
                    yield json.dumps(part, separators=(",", ":"), allow_nan=False).encode()
        except ApiError as error:
            self._generation.account.failure = error.status
            yield json.dumps(error.body()).encode()
        except Exception:
            logger.exception("a stream ended by a mistake of the server")
            mistake = fault()
            self._generation.account.failure = mistake.status
            yield json.dumps(mistake.body()).encode()
        else:
            yield b"[DONE]"
