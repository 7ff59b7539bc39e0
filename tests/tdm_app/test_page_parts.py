"""What the page is made of, and how it shares an address with the API; no browser needed."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tdm_app.api import create_app
from tdm_app.page.boxes import requests_of, size_choices
from tdm_app.page.words import caption, table
from tdm_serve import AsyncEngine, Pipeline
from tdm_serve.errors import InvalidRequest


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/nothing", 404), ("GET", "/assets/nothing.js", 404), ("POST", "/", 405),
     ("GET", "/v1/images/generations", 405), ("POST", "/gradio_api/upload", 404), ("GET", "/login", 404)],
)  # fmt: skip
def test_the_page_does_not_answer_for_the_api(
    server: Any, assert_error: Any, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, server.url + path)
    assert_error(response, status, {404: "not_found", 405: "method_not_allowed"}[status])


@pytest.mark.anyio
async def test_without_gradio_the_api_runs(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # what the import system sees where it is not installed
    app = create_app(AsyncEngine(pipeline), page=True)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert "pip install 'tdm-serve[demo]'" in (await client.get("/")).text
        assert (await client.post("/v1/images/generations", json={"prompt": "a red circle"})).status_code == 200


def test_size_choices(pipeline: Pipeline) -> None:
    names, sizes = zip(*size_choices(pipeline.info), strict=True)
    assert sizes[0] == f"{pipeline.info.width}x{pipeline.info.height}"
    assert names[0] == "Square · 128 by 128"
    assert len(sizes) == len(set(sizes)) == 5
    for size in sizes:
        for request in requests_of("a red circle", "", size, 1):
            pipeline.check(request)


def test_size_choices_stay_within_a_models_limits(pipeline: Pipeline) -> None:
    square_only = replace(pipeline.info, min_side=pipeline.info.width, max_side=pipeline.info.width)
    assert [size for _, size in size_choices(square_only)] == [f"{pipeline.info.width}x{pipeline.info.height}"]


def test_requests_of_the_boxes() -> None:
    made = requests_of("a red circle", " 5 ", "128x96", 2)
    assert [(one.seed, one.width, one.height) for one in made] == [(5, 128, 96), (6, 128, 96)]
    for bad, param in ((("", "x", "128x128", 1), "seed"), (("", "", "big", 1), "size"), (("", "", "128x128", 5), "n")):
        with pytest.raises(InvalidRequest) as caught:
            requests_of(*bad)
        assert caught.value.param == param


def test_caption_and_table(pipeline: Pipeline) -> None:
    pictures = pipeline("a red circle", seed=9, n=2)
    assert re.fullmatch(r"seed 9 · 4 NFE · \d+ ms", caption(pictures[0]))
    lines = table(pictures).splitlines()
    assert lines[0] == "| picture | seed | NFE | text ms | denoise ms | decode ms | total ms |"
    assert re.match(r"\| 2 \| 10 \| 4 \| \d", lines[3])
