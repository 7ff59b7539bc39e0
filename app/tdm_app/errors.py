"""Every error of the service in OpenAI's shape: one table from exception to status, type and code.

The body is always `{"error": {"message", "type", "param", "code"}}` with all four keys. FastAPI's own shapes
(`{"detail": ...}`, 422) never leave the API.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tdm_app.wording import first_problem
from tdm_serve.errors import (
    Cancelled,
    DeadlinePassed,
    DeadlineUnreachable,
    EngineClosed,
    EngineFailed,
    InvalidRequest,
    OutOfDeviceMemory,
    OutputError,
    Overloaded,
    PictureFailed,
    PromptTooLong,
    TdmServeError,
    UnknownModel,
)

log = logging.getLogger(__name__)

# What the engine calls a field, where the API has another name for it.
PARAMS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
CLIENT, RATE, SERVER = "invalid_request_error", "rate_limit_error", "server_error"
CLIENT_GONE = 499  # nobody reads it; the access log and the metrics show it
SOON_MS = 1000.0  # when to come back where nothing can be predicted
LEAST_MS = 100.0  # nobody is asked to come back sooner: that would be a busy loop
SPREAD = 0.25  # of the wait, and at least LEAST_MS: those who are refused together do not come back together
NO_RETRY = {"x-should-retry": "false"}


@dataclass(frozen=True, slots=True)
class Kind:
    """Everything about an error but its sentence. `retry_ms` is when it is worth a try again, as far as one knows."""

    status: int
    type: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    retry_ms: float | None = None


class NotFound(TdmServeError):
    """Something that is asked for by its id and is not there, or not this client's."""


class AlreadyFinished(TdmServeError):
    """A job that can no longer be cancelled."""


class ClientGone(TdmServeError):
    """The client closed the connection before its answer was there."""


# The nearest class in an exception's ancestry decides. `Exception` catches the rest, with no detail to the client.
TABLE: dict[type[BaseException], Kind] = {
    InvalidRequest: Kind(400, CLIENT, "invalid_value"),
    PromptTooLong: Kind(400, CLIENT, "prompt_too_long"),
    UnknownModel: Kind(404, CLIENT, "model_not_found"),
    NotFound: Kind(404, CLIENT, "not_found"),
    AlreadyFinished: Kind(409, CLIENT, "already_finished", NO_RETRY),
    Overloaded: Kind(429, RATE, "overloaded"),
    DeadlineUnreachable: Kind(429, RATE, "deadline_unreachable", NO_RETRY),
    ClientGone: Kind(CLIENT_GONE, CLIENT, "client_gone"),
    Cancelled: Kind(CLIENT_GONE, CLIENT, "cancelled", NO_RETRY),
    PictureFailed: Kind(500, SERVER, "picture_failed"),
    OutOfDeviceMemory: Kind(503, SERVER, "out_of_memory", retry_ms=SOON_MS),
    EngineFailed: Kind(503, SERVER, "engine_failed", retry_ms=SOON_MS),
    EngineClosed: Kind(503, SERVER, "unavailable", retry_ms=SOON_MS),
    OutputError: Kind(503, SERVER, "storage_failed", retry_ms=SOON_MS),
    DeadlinePassed: Kind(504, SERVER, "deadline_passed", NO_RETRY),
    Exception: Kind(500, SERVER, "internal_error"),
}
# Answers that the framework gives by itself, such as an unknown path.
HTTP_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}
STORAGE = "the service cannot write its state; its log says why"
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
        retry = {} if self.kind.retry_ms is None else retry_headers(self.kind.retry_ms)
        return JSONResponse(self.body(), self.kind.status, headers={**retry, **self.kind.headers})


def kind_of(error: BaseException) -> Kind:
    """The row of the table for an exception."""
    return next(TABLE[ancestor] for ancestor in type(error).__mro__ if ancestor in TABLE)


def problem_of(error: Exception) -> Problem:
    """What the client is told. Only errors that are in the table by name show their message."""
    kind = kind_of(error)
    if for_the_log(error):
        return Problem(kind, STORAGE if isinstance(error, OutputError) else INTERNAL)
    if isinstance(error, Overloaded):
        kind = replace(kind, retry_ms=error.retry_after_ms)
    return Problem(kind, str(error), _param(error))


def for_the_log(error: BaseException) -> bool:
    """Whether an error's own words are for the operator only; whoever answers with it has to log it."""
    return kind_of(error) in (TABLE[Exception], TABLE[OutputError])  # a Kind has no hash


def retry_headers(retry_after_ms: float, chance: Callable[[], float] = random.random) -> dict[str, str]:
    """When to come back, for OpenAI's clients in milliseconds and for everybody in whole seconds, both rounded up.

    Never sooner than predicted, and a little later by `chance` (0 to 1), anew for every answer.
    """
    least_ms = max(LEAST_MS, retry_after_ms)
    wait_ms = math.ceil(least_ms + chance() * max(LEAST_MS, SPREAD * least_ms))
    return {"retry-after-ms": str(wait_ms), "retry-after": str(math.ceil(wait_ms / 1000))}


def _param(error: Exception) -> str | None:
    """The API's name of the field that an error is about."""
    match error:
        case InvalidRequest(param=str(name)):
            return PARAMS.get(name, name)
        case UnknownModel():
            return "model"
        case DeadlineUnreachable() | DeadlinePassed():
            return "deadline_ms"
        case _:
            return None


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
    kind = Kind(status, _http_type(status), _http_code(status), error.headers or {})
    return Problem(kind, _http_message(request, status, error.detail)).response()


def _http_type(status: int) -> str:
    return SERVER if status >= 500 else RATE if status == 429 else CLIENT


def _http_code(status: int) -> str:
    return HTTP_CODES.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")


def _http_message(request: Request, status: int, detail: str) -> str:
    where = f"{request.method} {request.url.path}"
    if status == 404:
        return f"there is nothing at {where}; /docs lists the endpoints"
    if status == 405:
        return f"{where} is not allowed; see the allow header"
    return str(detail)
