"""How the page shares an address with the API; no browser needed."""

from __future__ import annotations

import sys
from typing import Any

import httpx
import pytest

from tdm_app.api import create_app
from tdm_serve import AsyncEngine, Pipeline


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/nothing", 404), ("GET", "/assets/nothing.js", 404), ("POST", "/", 405),
     ("GET", "/v1/images/generations", 405), ("POST", "/gradio_api/upload", 404), ("GET", "/login", 404)],
)  # fmt: skip
def test_the_page_does_not_answer_for_the_api(
    site: Any, assert_error: Any, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, site.url + path)
    assert_error(response, status, {404: "not_found", 405: "method_not_allowed"}[status])


@pytest.mark.anyio
async def test_without_gradio_the_api_runs(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # what the import system sees where it is not installed
    app = create_app(AsyncEngine(pipeline), page=True)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert "pip install 'tdm-serve[demo]'" in (await client.get("/")).text
        assert (await client.post("/v1/images/generations", json={"prompt": "a red circle"})).status_code == 200
