"""What the official client sees when a request is refused or fails: the class, the code, and when to come back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from servers import serving, value_of, wait_ready

from tdm_app.api import create_app
from tdm_app.errors import SOON_MS, SPREAD
from tdm_app.settings import Settings
from tdm_serve import AsyncEngine, Pipeline
from tdm_serve.core import Request, Terms
from tdm_serve.errors import (
    Cancelled,
    DeadlinePassed,
    EngineClosed,
    EngineFailed,
    OutOfDeviceMemory,
    Overloaded,
    PictureFailed,
)
from tdm_serve.scheduler import Policy
from tdm_serve.ticket import Ticket

PROMPT = "two red circles"


def client_of(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": 0, **options})


class Failing(AsyncEngine):
    """A real engine that refuses, or fails what it has accepted, in a given way."""

    at_once: Exception | None = None
    later: Exception | None = None
    attempts = 0

    def submit(self, requests: Sequence[Request], terms: Terms = Terms(), *, previews: bool = False) -> Ticket:  # noqa: B008
        if self.ready and self.at_once is not None:
            self.attempts += 1
            raise self.at_once
        ticket = super().submit(requests, terms, previews=previews)
        if self.later is not None:
            ticket._mailbox.settle(self.later)
        return ticket


@pytest.fixture(scope="module")
def running(pipeline: Pipeline) -> Iterator[tuple[Failing, str]]:
    engine = Failing(pipeline)
    with serving(create_app(engine, page=False)) as url:
        wait_ready(url)
        yield engine, url


@pytest.fixture
def failing(running: tuple[Failing, str]) -> Iterator[tuple[Failing, str]]:
    engine, url = running
    yield engine, url
    engine.at_once = engine.later = None
    engine.attempts = 0


@pytest.mark.parametrize(
    ("error", "kind", "status", "code", "least_ms"),
    [
        (Overloaded("full", 1234.2), openai.RateLimitError, 429, "overloaded", 1234.2),
        (EngineClosed("stopping"), openai.InternalServerError, 503, "unavailable", SOON_MS),
        (EngineFailed("it died"), openai.InternalServerError, 503, "engine_failed", SOON_MS),
        (OutOfDeviceMemory("no room"), openai.InternalServerError, 503, "out_of_memory", SOON_MS),
        (DeadlinePassed("late"), openai.InternalServerError, 504, "deadline_passed", None),
        (PictureFailed("NaN"), openai.InternalServerError, 500, "picture_failed", None),
        (Cancelled("called off"), openai.APIStatusError, 499, "cancelled", None),
        (RuntimeError("a secret path"), openai.InternalServerError, 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("moment", ["at_once", "later"])
def test_each_failure_has_its_class(
    failing: tuple[Failing, str],
    error: Exception,
    kind: type[openai.APIStatusError],
    status: int,
    code: str,
    least_ms: float | None,
    moment: str,
) -> None:
    engine, url = failing
    setattr(engine, moment, error)
    with client_of(url) as client, pytest.raises(kind) as caught:
        client.images.generate(prompt=PROMPT)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "secret" not in str(caught.value)
    headers = caught.value.response.headers
    assert ("retry-after" in headers) is ("retry-after-ms" in headers) is (least_ms is not None)
    if least_ms is not None:
        wait_ms = int(headers["retry-after-ms"])
        assert least_ms <= wait_ms <= (1 + SPREAD) * least_ms + 1
        assert int(headers["retry-after"]) == math.ceil(wait_ms / 1000)
    assert headers["x-request-id"]


@pytest.mark.parametrize("error", [EngineFailed("it died"), RuntimeError("a secret path")])
def test_a_failure_in_mid_stream_is_raised(failing: tuple[Failing, str], error: Exception) -> None:
    engine, url = failing
    engine.later = error
    with client_of(url) as client, pytest.raises(openai.APIError) as caught:
        list(client.images.generate(prompt=PROMPT, stream=True, partial_images=1))
    assert caught.value.code == ("engine_failed" if isinstance(error, EngineFailed) else "internal_error")
    assert "secret" not in str(caught.value)


def retries(url: str) -> float:
    return value_of(httpx.get(f"{url}/metrics").text, "tdm_serve:http_client_retries_total")


def test_the_client_comes_back_when_it_was_told_to(failing: tuple[Failing, str]) -> None:
    engine, url = failing
    before = retries(url)
    engine.at_once = Overloaded("full", 30)
    with client_of(url, max_retries=2) as client, pytest.raises(openai.RateLimitError):
        client.images.generate(prompt=PROMPT)
    assert engine.attempts == 3
    assert retries(url) == before + 2


def test_a_deadline_that_cannot_be_met_is_not_tried_again(failing: tuple[Failing, str]) -> None:
    _, url = failing
    before = retries(url)
    with client_of(url, max_retries=2) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt=PROMPT, extra_body={"deadline_ms": 1})
        assert (caught.value.code, caught.value.param) == ("deadline_unreachable", "deadline_ms")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert client.images.generate(prompt=PROMPT, extra_body={"deadline_ms": 60_000}).data[0].nfe == 4
    assert 'tdm_serve:requests_refused_total{reason="deadline"} 1.0' in httpx.get(f"{url}/metrics").text
    assert retries(url) == before


def test_a_full_queue_says_when_there_is_room(pipeline: Pipeline) -> None:
    with serving(create_app(AsyncEngine(pipeline, policy=Policy(max_waiting=12)), page=False)) as url:
        wait_ready(url)
        check_full_queue(url)


def waiting_ms(error: openai.RateLimitError) -> float:
    assert (error.code, error.type) == ("overloaded", "rate_limit_error")
    ms, s = (float(error.response.headers[name]) for name in ("retry-after-ms", "retry-after"))
    assert 0 < ms <= s * 1000 < ms + 1000
    return ms


def check_full_queue(url: str) -> None:
    def ask(seed: int) -> float:
        """How long to wait, 0 when served."""
        with client_of(url) as client:
            try:
                client.images.generate(prompt=PROMPT, n=4, extra_body={"seed": seed})
            except openai.RateLimitError as error:
                return waiting_ms(error)
            return 0.0

    with ThreadPoolExecutor(12) as pool:
        waits = list(pool.map(ask, range(12)))
    assert waits.count(0.0) >= 3  # those that were accepted
    assert max(waits) > 0.0
    with (
        client_of(url, max_retries=100) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        made = pool.map(lambda seed: client.images.generate(prompt=PROMPT, n=4, extra_body={"seed": seed}), range(8))
        assert all(len(answer.data) == 4 for answer in made)


def test_keys(pipeline: Pipeline) -> None:
    secret = "a-long-admin-key-for-this-test"
    settings = Settings.model_validate({"auth": "on", "admin_key": secret})
    with serving(create_app(AsyncEngine(pipeline), settings, page=False)) as url:
        with client_of(url) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.images.generate(prompt=PROMPT)
        assert caught.value.code == "invalid_api_key"
        with client_of(url, api_key=secret) as client:
            assert client.images.generate(prompt=PROMPT).data[0].nfe == 4
