"""The API as an ASGI application: routes, errors and the gate before them."""

from typing import Any

from fastapi import FastAPI

from accessory.serve.http import about, chat, completions, errors, tokenizing
from accessory.serve.http.gate import Counted, Gate
from accessory.serve.http.settings import ServerSettings
from accessory.serve.http.state import ServerState
from accessory.serve.request import Engine

API_VERSION = "1"


def create_app(engine: Engine | None = None, settings: ServerSettings | None = None) -> FastAPI:
    """The application; ``app.state.server`` is its `ServerState`.

    Args:
        engine: None: not loaded yet. Requests are answered with 503 until ``app.state.server.load(engine)``.
    """
    settings = settings or ServerSettings()
    # FastAPI's own pages load scripts from elsewhere; the OpenAPI page itself is served.
    app = FastAPI(
        title="accessory",
        version=API_VERSION,
        description="An OpenAI-compatible API of a Mixture-of-Experts model.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state = ServerState(engine, settings)
    errors.install(app)
    for part in (completions, chat, about, tokenizing):
        app.include_router(part.router)
    _document(app)
    app.add_middleware(Gate, key=settings.api_key, limit=settings.body_limit)
    app.add_middleware(Counted, metrics=state.metrics, paths=["/openapi.json", *app.openapi()["paths"]])
    return app


def _document(app: FastAPI) -> None:
    """FastAPI lists a 422 for each operation with a body; here such requests get 400, as OpenAI's do."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        page = made()
        for operations in page["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            page["components"]["schemas"].pop(name, None)
        return page

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to change the page
