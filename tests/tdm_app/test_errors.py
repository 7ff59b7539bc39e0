"""Every bad input gets OpenAI's error body, with the field and what is allowed; FastAPI's shapes never show."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from tdm_app.api import create_app
from tdm_app.errors import LEAST_MS, TABLE, kind_of, problem_of, retry_headers
from tdm_app.schemas import ImageRequest
from tdm_app.service import Service
from tdm_serve import AsyncEngine, Pipeline
from tdm_serve.errors import CheckpointError, EngineClosed, InvalidRequest, PromptTooLong, TdmServeError

pytestmark = pytest.mark.anyio

URL = "/v1/images/generations"
JSON = {"content-type": "application/json"}
Check = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "param", "code", "said"),
    [
        ({"prompt": ""}, "prompt", "invalid_value", "empty"),
        ({"prompt": " \n"}, "prompt", "invalid_value", "empty"),
        ({"prompt": None}, "prompt", "missing_required_parameter", "required"),
        ({"prompt": 5}, "prompt", "invalid_type", "5"),
        ({"prompt": ["a", "b"]}, "prompt", "invalid_type", "string"),
        ({"prompt": "red " * 2000}, "prompt", "prompt_too_long", "token"),
        ({"prompt": "x" * 32_001}, "prompt", "prompt_too_long", "32001 characters"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value", "prompt"),
        ({"n": 0}, "n", "invalid_value", "between 1 and 10"),
        ({"n": 11}, "n", "invalid_value", "between 1 and 10"),
        ({"n": "2"}, "n", "invalid_type", "'2'"),
        ({"n": True}, "n", "invalid_type", "True"),
        ({"n": 1.5}, "n", "invalid_type", "1.5"),
        ({"seed": -1}, "seed", "invalid_value", "-1"),
        ({"seed": 2**63}, "seed", "invalid_value", str(2**63)),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "invalid_value", str(2**63 - 1)),
        ({"seed": "7"}, "seed", "invalid_type", "'7'"),
        ({"size": "128"}, "size", "invalid_value", "'128'"),
        ({"size": "0x0"}, "size", "invalid_value", "0x0"),
        ({"size": "130x128"}, "size", "invalid_value", "multiple of"),
        ({"size": "99984x128"}, "size", "invalid_value", "between"),
        ({"size": "1024x1024"}, "size", "invalid_value", "1024"),
        ({"num_inference_steps": 0}, "num_inference_steps", "invalid_value", "0"),
        ({"num_inference_steps": 10_000}, "num_inference_steps", "invalid_value", "10000"),
        ({"num_inference_steps": "four"}, "num_inference_steps", "invalid_type", "'four'"),
        ({"stream": True, "response_format": "url"}, "stream", "unsupported_value", "allowed: false with"),
        ({"stream": "yes"}, "stream", "invalid_type", "'yes'"),
        ({"partial_images": 2}, "partial_images", "unsupported_value", "allowed: 0 where stream is false"),
        ({"partial_images": 4}, "partial_images", "invalid_value", "4"),
        ({"response_format": "tiff"}, "response_format", "invalid_value", "'tiff'"),
        ({"background": "transparent"}, "background", "unsupported_value", "opaque or auto"),
        ({"output_format": "gif"}, "output_format", "invalid_value", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "invalid_value", "101"),
        ({"output_compression": 50}, "output_compression", "unsupported_value", "100 for png"),
        ({"quality": "ultra"}, "quality", "invalid_value", "'ultra'"),
        ({"style": "cubist"}, "style", "invalid_value", "'vivid' or 'natural'"),
        ({"moderation": "off"}, "moderation", "invalid_value", "'off'"),
        ({"user": 5}, "user", "invalid_type", "5"),
        ({"model": 5}, "model", "invalid_type", "5"),
        ({"user": "x" * 257}, "user", "invalid_value", "256"),
        ({"guidance_scale": -1}, "guidance_scale", "invalid_value", "between 0 and 30"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "invalid_value", "finite"),
        ({"guidance_scale": "high"}, "guidance_scale", "invalid_type", "'high'"),
        ({"negative_prompt": "blur"}, "negative_prompt", "invalid_value", "guidance"),
        ({"negative_prompt": 5}, "negative_prompt", "invalid_type", "5"),
        ({"deadline_ms": 0}, "deadline_ms", "invalid_value", "greater than 0"),
        ({"deadline_ms": 1e300}, "deadline_ms", "invalid_value", "86400000"),
        ({"deadline_ms": float("inf")}, "deadline_ms", "invalid_value", "finite"),
        ({"priority": 11}, "priority", "invalid_value", "10"),
        ({"priority": -11}, "priority", "invalid_value", "-10"),
        ({"priority": 0.5}, "priority", "invalid_type", "0.5"),
        ({"cfg_scale": 3.0}, "cfg_scale", "unknown_parameter", "/docs"),
    ],
)
async def test_bad_fields(
    client: httpx.AsyncClient, assert_error: Check, change: dict[str, Any], param: str, code: str, said: str
) -> None:
    response = await client.post(URL, content=json.dumps({"prompt": "a red circle", **change}), headers=JSON)
    error = assert_error(response, 400, code, param)
    assert said in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_body"),
        (b"{", "invalid_json"),
        (b'{"prompt": "a",}', "invalid_json"),
        (b"null", "invalid_body"),
        (b"[]", "invalid_body"),
        (b'"a red circle"', "invalid_body"),
        (b"\xff\xfe{}", "invalid_json"),
        (b"[" * 200_000, "invalid_body"),
    ],
)
async def test_bad_bodies(client: httpx.AsyncClient, assert_error: Check, body: bytes, code: str) -> None:
    assert_error(await client.post(URL, content=body, headers=JSON), 400, code)


async def test_a_field_name_that_utf8_cannot_carry(client: httpx.AsyncClient, assert_error: Check) -> None:
    response = await client.post(URL, content=b'{"prompt": "a", "\\ud800": 1}', headers=JSON)
    assert "Unicode" in assert_error(response, 400, "invalid_body")["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(ImageRequest.model_fields)) | st.text(max_size=9)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=VALUES | st.dictionaries(FIELDS, VALUES, max_size=6).map(lambda fields: {**fields, "prompt": " "}))
async def test_whatever_is_sent_the_error_has_our_shape(client: httpx.AsyncClient, body: Any) -> None:
    response = await client.post(URL, content=json.dumps(body), headers=JSON)
    assert response.status_code in (400, 404)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_null_means_the_default(client: httpx.AsyncClient) -> None:
    names = ("model", "n", "size", "seed", "stream", "output_format", "quality", "user", "partial_images")
    response = await client.post(URL, json={"prompt": "a red circle", **dict.fromkeys(names)})
    assert response.status_code == 200, response.text
    assert len(response.json()["data"]) == 1


async def test_unknown_model(client: httpx.AsyncClient, assert_error: Check) -> None:
    response = await client.post(URL, json={"prompt": "a red circle", "model": "dall-e-2"})
    error = assert_error(response, 404, "model_not_found", "model")
    assert "'dall-e-2'" in error["message"]
    assert_error(await client.get("/v1/models/dall-e-2"), 404, "model_not_found", "model")


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/images", "/v1/nothing/at/all", "/healthz/x", "/redoc"])
async def test_unknown_paths(client: httpx.AsyncClient, assert_error: Check, path: str) -> None:
    assert path in assert_error(await client.get(path), 404, "not_found")["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", URL), ("PUT", URL), ("DELETE", URL), ("POST", "/v1/models"), ("POST", "/healthz")]
)
async def test_wrong_methods(client: httpx.AsyncClient, assert_error: Check, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_wrong_media_types(client: httpx.AsyncClient, assert_error: Check, media_type: str) -> None:
    headers = {"content-type": media_type} if media_type else {}
    response = await client.post(URL, content=b'{"prompt": "a red circle"}', headers=headers)
    assert "application/json" in assert_error(response, 415, "unsupported_media_type")["message"]


async def test_media_type_with_a_charset(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    response = await client.post(URL, content=b'{"prompt": "a red circle"}', headers=headers)
    assert response.status_code == 200


@pytest.fixture
def broken(pipeline: Pipeline) -> FastAPI:
    """The service with routes added that fail in ways that a route can."""
    app = create_app(AsyncEngine(pipeline), page=False)

    async def crash() -> None:
        raise RuntimeError("a secret path")

    async def refuse() -> None:
        raise HTTPException(429, "slow down", {"retry-after": "3"})

    async def lose() -> None:
        raise CheckpointError("/home/somebody/weights is gone")

    for route in (crash, refuse, lose):
        app.add_api_route(f"/{route.__name__}", route)
    return app


async def test_unexpected_exceptions_stay_in_the_log(
    broken: FastAPI, assert_error: Check, caplog: pytest.LogCaptureFixture
) -> None:
    transport = httpx.ASGITransport(broken)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/crash", "/lose"):
            caplog.clear()
            response = await client.get(path, headers={"x-request-id": "find-me"})
            error = assert_error(response, 500, "internal_error")
            assert "secret" not in response.text
            assert "somebody" not in response.text
            assert response.headers["x-request-id"] == "find-me"
            assert "x-request-id" in error["message"]
            assert "find-me" in caplog.text


async def test_other_http_errors_keep_status_and_headers(broken: FastAPI, assert_error: Check) -> None:
    transport = httpx.ASGITransport(broken)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/refuse")
    assert assert_error(response, 429, "too_many_requests")["message"] == "slow down"
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1.2_3", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), ("", False), ("a\tb", False)],
)
async def test_request_ids(client: httpx.AsyncClient, sent: str, kept: bool) -> None:
    answered = (await client.get("/healthz", headers={"x-request-id": sent})).headers["x-request-id"]
    assert (answered == sent) is kept
    assert answered


async def test_readiness_follows_the_engine(pipeline: Pipeline, assert_error: Check) -> None:
    app = create_app(AsyncEngine(pipeline), page=False)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/readyz")
        assert_error(response, 503, "unavailable")
        assert response.headers["retry-after"] in {"1", "2"}
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        for path in ("/healthz", "/readyz"):  # some load balancers ask without wanting a body
            assert (await client.head(path)).status_code == (await client.get(path)).status_code
        async with app.router.lifespan_context(app):
            # sent at once, so it waits for the warm-up
            assert (await client.post(URL, json={"prompt": "a red circle"})).status_code == 200
            assert (await client.get("/readyz")).json() == {"status": "ready"}
        assert_error(await client.get("/readyz"), 503, "unavailable")
        assert_error(await client.post(URL, json={"prompt": "a red circle"}), 503, "unavailable")


@pytest.mark.parametrize("pause_s", [0.0, 0.01])
async def test_stopping_in_the_middle_of_the_start(pipeline: Pipeline, pause_s: float) -> None:
    app = create_app(AsyncEngine(pipeline), page=False)
    async with asyncio.timeout(30), app.router.lifespan_context(app):
        await asyncio.sleep(pause_s)
    assert not app.state.service.ready
    assert app.state.service.failure is None


async def test_what_is_done_after_the_start(pipeline: Pipeline) -> None:
    app = create_app(AsyncEngine(pipeline), page=False)
    service: Service = app.state.service
    ready: list[bool] = []
    service.on_start = lambda: ready.append(service.ready)
    async with asyncio.timeout(30), app.router.lifespan_context(app):
        await service.started()
    assert ready == [True]


async def test_an_engine_that_cannot_start(pipeline: Pipeline, assert_error: Check) -> None:
    """A device thread starts only once, so an engine that has run already fails to start."""
    engine = AsyncEngine(pipeline)
    await engine.start()
    await engine.close()
    app = create_app(engine, page=False)
    service: Service = app.state.service
    told: list[bool] = []
    service.on_failure = lambda: told.append(True)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert_error(await client.post(URL, json={"prompt": "a red circle"}), 503, "unavailable")
        assert "did not start" in assert_error(await client.get("/readyz"), 503, "unavailable")["message"]
    assert told == [True]
    assert isinstance(service.failure, RuntimeError)


async def test_the_table_knows_nearest_ancestors() -> None:
    assert kind_of(PromptTooLong("too long", "prompt")).code == "prompt_too_long"
    assert kind_of(InvalidRequest("bad", "n")).status == 400
    assert kind_of(EngineClosed("closing")).status == 503
    assert kind_of(TdmServeError("anything else")) is TABLE[Exception]
    assert problem_of(InvalidRequest("bad", "steps")).param == "num_inference_steps"
    assert problem_of(InvalidRequest("bad")).param is None


def test_a_refused_crowd_does_not_come_back_at_once() -> None:
    waits = [int(retry_headers(2000)["retry-after-ms"]) for _ in range(100)]
    assert min(waits) >= 2000
    assert max(waits) <= 2500
    assert max(waits) - min(waits) > 250
    soon = [int(retry_headers(0.3)["retry-after-ms"]) for _ in range(100)]
    assert LEAST_MS <= min(soon) < max(soon) <= 2 * LEAST_MS


@pytest.mark.parametrize(
    ("predicted_ms", "chance", "ms", "s"),
    [(0.3, 0.0, "100", "1"), (900.2, 0.0, "901", "1"), (900, 1.0, "1125", "2"), (4000, 0.5, "4500", "5")],
)
def test_both_retry_headers_say_the_same(predicted_ms: float, chance: float, ms: str, s: str) -> None:
    assert retry_headers(predicted_ms, lambda: chance) == {"retry-after-ms": ms, "retry-after": s}
