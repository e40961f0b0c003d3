"""What the OpenAPI page says of answers beside the usual one."""

from typing import Any

from accessory.serve.http.errors import ErrorBody

Responses = dict[int | str, dict[str, Any]]

_MEANINGS = {
    400: "The request makes no sense, or prompt and answer do not fit into the model's context.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "As many requests wait as may; Retry-After says when to come again.",
    503: "The model is not loaded yet, or its ranks are lost.",
}


def failures(*statuses: int) -> Responses:
    """Entries of an operation that may fail with these."""
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}


FAILURES = failures(*_MEANINGS)


def with_stream(responses: Responses) -> Responses:
    """The same for an operation that may also answer with a stream."""
    data = {"type": "string", "description": "A JSON object with a part of the answer; [DONE] in the last event."}
    stream = {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}  # of each event
    success = {
        "description": "The answer; with stream, as server-sent events.",
        "content": {"text/event-stream": stream},
    }
    return {200: success, **responses}
