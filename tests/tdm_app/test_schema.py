"""The API against its own OpenAPI document: whatever a fuzzer sends, no 5xx, and answers as they are documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, find, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from servers import serving, wait_ready

from tdm_app.api import create_app
from tdm_app.settings import Settings
from tdm_serve import AsyncEngine, Pipeline

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
FUZZ = settings(
    max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
MOST_STEPS = 2  # the fuzzer likes large numbers, and a picture of a hundred steps takes its time

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(pipeline: Pipeline) -> Iterator[str]:
    app = create_app(AsyncEngine(pipeline), Settings.model_validate({"feedback": True}), page=False)
    with serving(app) as address:
        wait_ready(address)
        yield address


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/openapi.json").json()


OPERATIONS = [
    ("POST", "/v1/images/generations"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/jobs/{job_id}"),
    ("DELETE", "/v1/jobs/{job_id}"), ("GET", "/v1/jobs/{job_id}/events"), ("POST", "/v1/feedback"),
    ("GET", "/v1/feedback"), ("DELETE", "/v1/feedback"), ("DELETE", "/v1/feedback/{feedback_id}"),
    ("GET", "/v1/files/{file_id}"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}"), ("GET", "/v1/capabilities"),
    ("GET", "/v1/training"), ("POST", "/v1/training"), ("GET", "/v1/training/{training_id}"),
    ("DELETE", "/v1/training/{training_id}"), ("POST", "/v1/training/{training_id}/load"),
    ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"),
]  # fmt: skip


def test_every_operation_is_fuzzed(document: dict[str, Any]) -> None:
    known = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert set(OPERATIONS) == known


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_fuzz(url: str, document: dict[str, Any], method: str, path: str, mode: GenerationMode) -> None:
    try:
        strategy = schemathesis.openapi.from_dict(document)[path][method].as_strategy(generation_mode=mode)
        find(strategy, lambda _: True, settings=settings(database=None))
    except (Unsatisfiable, schemathesis.errors.InvalidSchema):
        pytest.skip("nothing about this operation can be invalid")

    @FUZZ
    @given(case=strategy)
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("num_inference_steps"), int):
            case.body["num_inference_steps"] = min(case.body["num_inference_steps"], MOST_STEPS)
        response = case.call(base_url=url, timeout=60)
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    run()
