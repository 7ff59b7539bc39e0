"""Every error of the service in OpenAI's shape: one table from exception to status, type and code.

The body is always `{"error": {"message", "type", "param", "code"}}` with all four keys. FastAPI's own shapes
(`{"detail": ...}`, 422) never leave the API.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tdm_app.wording import first_problem
from tdm_serve.errors import EngineClosed, InvalidRequest, PromptTooLong, UnknownModel

log = logging.getLogger(__name__)

# What the engine calls a field, where the API has another name for it.
PARAMS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
CLIENT, SERVER = "invalid_request_error", "server_error"


@dataclass(frozen=True, slots=True)
class Kind:
    """Everything about an error but its sentence."""

    status: int
    type: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


# The nearest class in an exception's ancestry decides. `Exception` catches the rest, with no detail to the client.
TABLE: dict[type[BaseException], Kind] = {
    InvalidRequest: Kind(400, CLIENT, "invalid_value"),
    PromptTooLong: Kind(400, CLIENT, "prompt_too_long"),
    UnknownModel: Kind(404, CLIENT, "model_not_found"),
    EngineClosed: Kind(503, SERVER, "unavailable", {"retry-after": "1"}),
    Exception: Kind(500, SERVER, "internal_error"),
}
# Answers that the framework gives by itself, such as an unknown path.
HTTP_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}
INTERNAL = "something went wrong in the server; its log has the details under this answer's x-request-id"


@dataclass(frozen=True, slots=True)
class Problem:
    """An error, ready to be sent."""

    kind: Kind
    message: str
    param: str | None = None

    def body(self) -> dict[str, Any]:
        parts = {"message": self.message, "type": self.kind.type, "param": self.param, "code": self.kind.code}
        return {"error": parts}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.kind.status, headers=dict(self.kind.headers))


def kind_of(error: BaseException) -> Kind:
    """The row of the table for an exception."""
    return next(TABLE[ancestor] for ancestor in type(error).__mro__ if ancestor in TABLE)


def problem_of(error: Exception) -> Problem:
    """What the client is told. Only errors that are in the table by name show their message."""
    kind = kind_of(error)
    if kind is TABLE[Exception]:
        return Problem(kind, INTERNAL)
    param = error.param if isinstance(error, InvalidRequest) else None
    if isinstance(error, UnknownModel):
        param = "model"
    return Problem(kind, str(error), PARAMS.get(param, param) if param else None)


def install_error_handlers(app: FastAPI) -> None:
    """Puts this module's shape in place of FastAPI's for every error that a route or the router raises."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    for known in TABLE:
        if known is not Exception:  # the outermost middleware answers those, so that they carry the request id too
            app.add_exception_handler(cast("type[Exception]", known), _on_known)


async def _on_known(_request: Request, error: Exception) -> JSONResponse:
    return problem_of(error).response()


async def _on_validation(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    code, message, param = first_problem(error.errors())
    return Problem(Kind(400, CLIENT, code), message, param).response()


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = error.status_code
    kind = Kind(status, SERVER if status >= 500 else CLIENT, _http_code(status), error.headers or {})
    return Problem(kind, _http_message(request, status, error.detail)).response()


def _http_code(status: int) -> str:
    return HTTP_CODES.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")


def _http_message(request: Request, status: int, detail: str) -> str:
    where = f"{request.method} {request.url.path}"
    if status == 404:
        return f"there is nothing at {where}; /docs lists the endpoints"
    if status == 405:
        return f"{where} is not allowed; see the allow header"
    return str(detail)
