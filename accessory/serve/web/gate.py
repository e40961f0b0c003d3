"""What every request to a page passes first: a page takes short texts, and no files."""

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

# Bytes of a request: a question with its settings.
MOST_BYTES = 2**20


class Gate:
    """Refuses bodies that are large or of no told length, and what gradio would store on the disk."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope) if scope["type"] == "http" else None
        await (self._app if refusal is None else refusal)(scope, receive, send)


def _refusal(scope: Scope) -> PlainTextResponse | None:
    headers = Headers(scope=scope)
    length = headers.get("content-length", "0")
    # gradio takes files at several paths, and all of them in this form; its own pages send JSON.
    form = headers.get("content-type", "").strip().lower().startswith("multipart/")
    if form or scope["path"].rstrip("/").endswith("/upload"):
        return PlainTextResponse("this page takes no files", 403)
    if "transfer-encoding" in headers or not length.isdecimal():
        return PlainTextResponse("tell the length of the body", 411)
    if int(length) > MOST_BYTES:
        return PlainTextResponse(f"the body is larger than {MOST_BYTES} bytes", 413)
    return None
