"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from accessory.serve.request import Busy, RankLost

SECONDS_UNTIL_RETRY = 5  # of a server that loads its model again


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field of the request that is to blame, `code` a name for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI shapes it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return {"error": detail.model_dump()}

    def response(self) -> Response:
        # ASCII: a message that quotes the request may hold what has no UTF-8 form.
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, headers=self.headers, media_type="application/json")


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client is to blame."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    """There is no model to answer: not yet, or not any more."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(SECONDS_UNTIL_RETRY)})


def of_engine(error: Exception) -> ApiError | None:
    """What an engine's exception means to a client; None where it is a fault of the server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, RankLost):
        return unavailable(str(error))
    if isinstance(error, ValueError):
        return bad_request(str(error))
    if isinstance(error, FloatingPointError):  # of damaged weights, which the operator should hear of
        return ApiError(500, str(error), code="not_finite")
    return None


def fault() -> ApiError:
    """Something that nobody foresaw; the log has it."""
    return ApiError(500, "the server made a mistake; its log says more", code="internal_error")


def install(app: FastAPI) -> None:
    """Give an app the handlers."""

    async def of_api(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"there is nothing at {request.method} {request.url.path}",
            405: f"{request.url.path} takes no {request.method}",
            400: "the body is no JSON that can be read: is it UTF-8, and not nested too deeply?",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def of_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_fields(error.errors()).response()

    async def of_anything(_: Request, __: Exception) -> Response:
        return fault().response()

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(Exception, of_anything)


def of_fields(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One error for what pydantic found wrong: of the first field, with all that was said about it."""
    first = next((error for error in errors if error["type"] == "unsupported_parameter"), errors[0])
    # Among the parts are pydantic's names of the types that a field takes, such as "str" and "list[TextPart]".
    path = [str(part) for part in first["loc"][1:] if str(part) != "str" and "[" not in str(part)]
    name, said = ".".join(path), str(first["msg"])
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return bad_request(f"the body is not valid JSON: {reason} at character {name}")
    if first["type"] == "inconsistent":
        return bad_request(said, first["ctx"]["param"], "invalid_value")
    if not path:
        return bad_request("the body must be a JSON object, sent with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown parameter {name!r}: leave it out", name, "unknown_parameter")
    if first["type"] == "unsupported_parameter":
        return bad_request(f"{name}: {said}", name, "unsupported_parameter")
    if first["type"] == "missing":
        return bad_request(f"{name} is missing: the request needs it", name, "missing_parameter")
    # A field that takes several types gets a complaint of each.
    about = [error for error in errors if error["loc"][1:2] == first["loc"][1:2]]
    if len(about) > 1:
        name, said = path[0], "; or: ".join(dict.fromkeys(str(error["msg"]) for error in about))
    return bad_request(f"{name}: {said}", name, "invalid_value")
