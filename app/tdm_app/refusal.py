"""Errors of the service that are no errors of the engine: an answer to be sent, as an exception."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from tdm_app.errors import CLIENT, RATE, SERVER, SOON_MS, Kind, Problem
from tdm_serve.errors import OutputError

log = logging.getLogger(__name__)

FULL = Problem(
    Kind(503, SERVER, "storage_failed", retry_ms=SOON_MS), "the service cannot write its state; its log says why"
)


class Refused(Exception):
    """A request that is answered with `problem`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refusal(
    status: int, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Problem:
    """A client's problem in OpenAI's shape."""
    return Problem(Kind(status, RATE if status == 429 else CLIENT, code, headers or {}), message, param)


def install_refusals(app: FastAPI) -> None:
    """Lets routes raise Refused, and answers for a full disk."""
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(OutputError, _on_output)


async def _on_refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return error.problem.response()


async def _on_output(_request: Request, error: Exception) -> JSONResponse:
    """The sentence names a path of the server, so it is for the log only."""
    log.error("%s", error)
    return FULL.response()
