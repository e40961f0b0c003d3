"""What the server says of itself: its model, whether it is well, and what it measures."""

import time
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from accessory.serve.http.answers import Health, Model, ModelList
from accessory.serve.http.documented import failures
from accessory.serve.http.errors import unavailable
from accessory.serve.http.state import ServerState, state_of

router = APIRouter()
_STARTED = int(time.time())
_PROMETHEUS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/v1/models", response_model=ModelList, responses=failures(401, 503), tags=["OpenAI"])
async def models(request: Request) -> Response:
    """The one model that is served."""
    return JSONResponse({"object": "list", "data": [_model(state_of(request))]})


@router.get("/v1/models/{model:path}", response_model=Model, responses=failures(401, 404, 503), tags=["OpenAI"])
async def model(model: str, request: Request) -> Response:
    """The model of that name."""
    state = state_of(request)
    state.check_model(model)
    return JSONResponse(_model(state))


@router.get("/health", response_model=Health, responses=failures(503), tags=["operation"])
async def health(request: Request) -> Response:
    """Whether requests can be answered; 503 while the model is loaded and when its ranks are lost."""
    trouble = state_of(request).trouble
    if trouble is not None:
        raise unavailable(trouble)
    return JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=Response, responses=_PROMETHEUS, tags=["operation"])
async def metrics(request: Request) -> Response:
    """Counts and times, for Prometheus."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "accessory",
        "max_model_len": state.engine.args.max_seq_len,
    }
