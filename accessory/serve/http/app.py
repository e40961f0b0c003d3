"""The API as an ASGI application: routes, errors and the gate before them."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from accessory.serve.http import about, chat, completions, docs, errors, tokenizing
from accessory.serve.http.access import Followed
from accessory.serve.http.gate import OPEN_PATHS, Gate
from accessory.serve.http.settings import ServerSettings
from accessory.serve.http.state import ServerState
from accessory.serve.request import Engine

API_VERSION = "1"
_KEY = "key"  # what the OpenAPI page calls it


def create_app(engine: Engine | None = None, settings: ServerSettings | None = None) -> FastAPI:
    """The application; ``app.state.server`` is its `ServerState`.

    Args:
        engine: None: not loaded yet. Requests are answered with 503 until ``app.state.server.load(engine)``.
    """
    settings = settings or ServerSettings()
    # FastAPI's own pages load scripts from elsewhere.
    app = FastAPI(
        title="accessory",
        version=API_VERSION,
        description="An OpenAI-compatible API of a Mixture-of-Experts model.",
        openapi_url=docs.OPENAPI,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state = ServerState(engine, settings)
    errors.install(app)
    for part in (completions, chat, about, tokenizing):
        app.include_router(part.router)
    docs.add_docs(app)
    _document(app, locked=settings.api_key is not None)
    app.add_middleware(Gate, key=settings.api_key, limit=settings.body_limit)
    app.add_middleware(Followed, metrics=state.metrics, paths=[*docs.PATHS, *app.openapi()["paths"]])
    if settings.origins:
        _let_in(app, settings.origins)
    return app


def _let_in(app: FastAPI, origins: Sequence[str]) -> None:
    """Let scripts of other origins' pages read the answers.

    This goes around everything else, the handler of the last errors among it: a browser sends no key with its question
    whether it may ask, and shows a script only what says that it may be seen.
    """
    made = app.build_middleware_stack

    def build() -> ASGIApp:
        return CORSMiddleware(
            made(),
            allow_origins=origins,
            allow_methods=("GET", "POST", "OPTIONS"),
            allow_headers=("*",),  # OpenAI's client in a browser sends some of its own
            allow_private_network=True,
            expose_headers=("Retry-After",),
        )

    app.build_middleware_stack = build  # type: ignore[method-assign]  # add_middleware's are inside of that handler


def _document(app: FastAPI, *, locked: bool) -> None:
    """Say of the operations what FastAPI does not know.

    It lists a 422 for each with a body; here such requests get 400, as OpenAI's do.

    Args:
        locked: they want a key.
    """
    made = app.openapi

    def openapi() -> dict[str, Any]:
        page = made()
        for operations in page["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            page["components"]["schemas"].pop(name, None)
        if locked:
            page["components"]["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
            page["security"] = [{_KEY: []}]
            for path in OPEN_PATHS:
                page["paths"][path]["get"]["security"] = []
        return page

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to change the page
