"""/docs and /openapi.json: complete, true, and readable without a network."""

from __future__ import annotations

import html
import re

import httpx
import pytest

from tdm_app.schemas import ImageRequest
from tdm_app.schemas_jobs import Job, JobRequest

pytestmark = pytest.mark.anyio


async def test_openapi(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/images/generations", "/v1/jobs", "/v1/jobs/{job_id}", "/v1/jobs/{job_id}/events", "/v1/feedback",
        "/v1/feedback/{feedback_id}", "/v1/files/{file_id}", "/v1/models", "/v1/models/{model}", "/v1/capabilities",
        "/v1/training", "/v1/training/{training_id}", "/v1/training/{training_id}/load",
        "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    fields = document["components"]["schemas"]["ImageRequest"]["properties"]
    assert set(fields) == set(ImageRequest.model_fields)
    assert {"type": "null"} in fields["n"]["anyOf"]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 10}
    assert fields["seed"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    assert fields["prompt"]["type"] == "string"


async def test_every_error_is_documented_in_our_shape(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path in (name for name in document["paths"] if name.startswith("/v1/")):
        for operation in document["paths"][path].values():
            assert set(operation["responses"]) in ({"200", "default"}, {"202", "default"})
            schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_docs_show_every_field_and_load_nothing(client: httpx.AsyncClient) -> None:
    response = await client.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    for name in ImageRequest.model_fields:
        assert f"<code>{name}</code>" in response.text
    for name in (*JobRequest.model_fields, *Job.model_fields, "result.data[].image_id", "error.code", "last-event-id"):
        assert f"<code>{name}</code>" in response.text
    assert "POST /v1/images/generations" in response.text
    assert "curl -X DELETE" in response.text
    assert "error.param" in response.text
    assert re.findall(r'(?:href|src)="([^"]*)"', response.text) == ["data:,", "openapi.json"]
    assert "<script" not in response.text


async def test_the_curl_examples_work(client: httpx.AsyncClient) -> None:
    shown = html.unescape((await client.get("/docs")).text)
    examples = re.findall(r"<pre>curl '([^']+)'(?: -H 'content-type: application/json' -d '([^']+)')?</pre>", shown)
    assert len(examples) == shown.count("<pre>") - shown.count("<pre>curl -X ")
    off = ("feedback", "training")  # needs a setting
    whole = [one for one in examples if "{" not in one[0].replace("{model}", "") and not any(o in one[0] for o in off)]
    assert len(whole) == 9
    for url, body in whole:
        headers = {"content-type": "application/json"} if body else {}
        answer = await client.request(
            "POST" if body else "GET", url.replace("{model}", "default"), content=body, headers=headers
        )
        assert answer.status_code in {200, 202}, url


async def test_root_without_the_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    assert "/docs" in response.text
