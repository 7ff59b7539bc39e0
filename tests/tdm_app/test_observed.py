"""Metrics, the log and traces: true numbers, one line a request, and nothing in them that is nobody's business."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from io import StringIO
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import value_of

from tdm_app.api import create_app
from tdm_app.logs import JsonLines, Text, _WithRequestId, configure_logs
from tdm_app.settings import Settings
from tdm_app.tracing import NoTracing, OpenTelemetry, stages_of, tracing_from_environment
from tdm_serve import AsyncEngine, Pipeline

pytestmark = pytest.mark.anyio

IMAGES = "/v1/images/generations"
OFF_HERE = ("feedback", "online_training", "authentication")
PROMPT = "a prompt that is nobody's business"


@asynccontextmanager
async def opened(pipeline: Pipeline, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(AsyncEngine(pipeline), Settings.model_validate(settings), page=False)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        await app.state.service.started()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))


NAMES = {
    "ready", "degraded", "num_pictures_waiting", "num_pictures_running", "backlog_seconds", "prompt_cache_bytes",
    "device_memory_bytes", "requests_accepted", "requests_finished", "requests_cancelled", "requests_failed",
    "requests_refused", "images", "evaluations", "steps", "device_restarts", "device_hangs", "model_memory_bytes",
    "model_loads", "model_unloads", "prompt_cache_hits", "prompt_cache_misses", "step_batch_size",
    "stage_duration_seconds", "eta_relative_error", "jobs",
    "http_request_duration_seconds", "http_requests_in_flight", "http_client_retries",
}  # fmt: skip


async def test_the_numbers_are_true(pipeline: Pipeline) -> None:
    async with opened(pipeline) as client:
        before = (await client.get("/metrics")).text
        await client.post(IMAGES, json={"prompt": PROMPT, "n": 3, "user": "somebody"})
        await client.post(IMAGES, json={"prompt": PROMPT, "deadline_ms": 0.001})
        await client.post(IMAGES, json={"prompt": ""})
        await client.get("/no/such/path/42")
        response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = response.text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    own = {name.removeprefix("tdm_serve:") for name in families if name.startswith("tdm_serve:")}
    assert {name for name in own if not name.endswith("_created")} == NAMES
    assert {"process_resident_memory_bytes", "process_open_fds"} <= set(families)

    def rise(name: str) -> float:
        return value_of(text, f"tdm_serve:{name}") - value_of(before, f"tdm_serve:{name}")

    assert (rise("images_total"), rise("evaluations_total")) == (3, 12)
    assert (rise("requests_accepted_total"), rise("requests_finished_total")) == (1, 1)
    assert rise("step_batch_size_sum") == 12
    assert rise("step_batch_size_count") == rise("steps_total") >= 4
    assert rise("eta_relative_error_count") == 1
    assert 'requests_refused_total{reason="deadline"} 1.0' in text
    assert 'requests_refused_total{reason="invalid"} 1.0' in text
    assert value_of(text, "tdm_serve:num_pictures_running") == 0
    assert value_of(text, "tdm_serve:ready") == 1
    for stage in ("text", "denoise", "decode"):
        assert f'stage_duration_seconds_count{{stage="{stage}"}}' in text
    count = 'http_request_duration_seconds_count{method="%s",route="%s",status="%s"} %s'
    assert count % ("POST", IMAGES, 200, "1.0") in text
    assert count % ("POST", IMAGES, 429, "1.0") in text
    assert count % ("POST", IMAGES, 400, "1.0") in text
    assert count % ("GET", "other", 404, "1.0") in text
    assert "nobody" not in text
    assert "somebody" not in text
    assert "/no/such/path" not in text


async def test_histograms_are_cumulative(client: httpx.AsyncClient) -> None:
    await client.post(IMAGES, json={"prompt": PROMPT})
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        if family.type != "histogram":
            continue
        series: dict[str, list[float]] = {}
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                key = str({name: value for name, value in sample.labels.items() if name != "le"})
                series.setdefault(key, []).append(sample.value)
        assert series
        assert all(counts == sorted(counts) for counts in series.values()), family.name


async def test_metrics_can_be_switched_off(pipeline: Pipeline) -> None:
    async with opened(pipeline, metrics=False) as client:
        assert (await client.get("/metrics")).status_code == 404


async def test_capabilities(client: httpx.AsyncClient) -> None:
    shown = (await client.get("/v1/capabilities")).json()
    assert shown["ready"] is True
    assert shown["degraded"] is None
    assert shown["models"] == [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    (shape,) = shown["shapes"]
    assert (shape["size"], shape["guided"]) == ("128x128", False)
    assert shape["best_batch"] >= 1
    assert 1 < shape["predicted_ms"]["default"] < 60_000
    names = ("max_images", "max_steps", "min_priority", "max_priority")
    assert [shown["limits"][name] for name in names] == [10, 100, -10, 10]
    assert shown["features"] == {"stream": True, "jobs": True, "url": True} | dict.fromkeys(OFF_HERE, False)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    """What a server would log as JSON, until the test ends."""
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    handler.addFilter(_WithRequestId())
    logger = logging.getLogger("tdm_app")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    return stream


def logged(stream: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_one_line_a_request(client: httpx.AsyncClient, lines: StringIO) -> None:
    headers = {"x-request-id": "mine", "authorization": "Bearer very-secret"}
    await client.post(f"{IMAGES}?signature=secret", json={"prompt": PROMPT, "n": 2}, headers=headers)
    (line,) = logged(lines)
    assert (line["message"], line["request_id"], line["level"], line["logger"]) == (
        "request", "mine", "info", "tdm_app.access",
    )  # fmt: skip
    assert (line["method"], line["path"], line["status"]) == ("POST", IMAGES, 200)
    assert (line["model"], line["n"], line["size"]) == ("default", 2, "128x128")
    assert line["ms"] > 0
    assert line["eta_ms"] > 0
    assert "secret" not in lines.getvalue()
    assert "nobody" not in lines.getvalue()


async def test_prompts_are_logged_only_where_that_is_wanted(pipeline: Pipeline, lines: StringIO) -> None:
    async with opened(pipeline, log_prompts=True) as client:
        await client.post(IMAGES, json={"prompt": PROMPT})
        await client.post("/v1/jobs", json={"prompt": PROMPT})
    assert [line["prompt"] for line in logged(lines) if "prompt" in line] == [PROMPT, PROMPT]


async def test_a_fault_has_its_traceback_and_its_request(client: httpx.AsyncClient, lines: StringIO) -> None:
    await client.get("/v1/models/nope", headers={"x-request-id": "a"})
    try:
        raise RuntimeError("inside")
    except RuntimeError:
        logging.getLogger("tdm_app").exception("it failed\nin two lines")
    first, second = logged(lines)
    assert (first["request_id"], first["status"]) == ("a", 404)
    assert "request_id" not in second
    assert "RuntimeError: inside" in second["traceback"]


def test_text_lines_cannot_be_forged() -> None:
    record = logging.LogRecord("tdm_app", logging.INFO, "", 1, "one\nWARNING two", (), None)
    record.facts = {"path": '/a b"c', "status": 200}
    record.request_id = "x"
    line = Text().format(record)
    assert "\n" not in line
    assert line.endswith('INFO tdm_app: one\\nWARNING two path="/a b\\"c" status=200 request_id=x')


def test_configure(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    stream = StringIO()
    levels = {name: logging.getLogger(name).level for name in ("tdm_app", "tdm_serve")}
    try:
        configure_logs("json", "info", stream)
        logging.getLogger("tdm_app.x").info("heard")
        logging.getLogger("another").info("not heard")
        logging.getLogger("another").warning("heard, too")
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["heard", "heard, too"]


async def test_traces(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("tdm_app.api.tracing_from_environment", lambda: OpenTelemetry(provider))
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with opened(pipeline) as client:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "x-request-id": "mine"}
        await client.post(IMAGES, json={"prompt": PROMPT}, headers=headers)
        await client.post(IMAGES, json={"prompt": PROMPT, "stream": True})
        spans = {span.name: span for span in exporter.get_finished_spans() if span.context.trace_id == int(trace, 16)}
        assert set(spans) == {"POST", "queue", "text", "denoise", "decode", "encode"}
        server = spans["POST"]
        assert server.attributes["http.route"] == IMAGES
        assert server.attributes["http.response.status_code"] == 200
        assert server.attributes["tdm_serve.request_id"] == "mine"
        for name in ("queue", "text", "denoise", "decode", "encode"):
            assert spans[name].parent.span_id == server.context.span_id
            assert server.start_time <= spans[name].start_time <= spans[name].end_time <= server.end_time
        assert "nobody" not in str([dict(span.attributes) for span in exporter.get_finished_spans()])
        assert len([span for span in exporter.get_finished_spans() if span.name == "denoise"]) == 2
        await asyncio.sleep(0)


def test_stages_are_laid_end_to_end() -> None:
    spans = stages_of({"text": 1.0, "denoise": 4.0, "decode": 2.0}, 0, 10_000_000)
    assert spans == [
        ("queue", 0, 3_000_000), ("text", 3_000_000, 4_000_000), ("denoise", 4_000_000, 8_000_000),
        ("decode", 8_000_000, 10_000_000),
    ]  # fmt: skip
    crowded = stages_of({"denoise": 99.0, "decode": 2.0}, 0, 10_000_000)
    assert all(0 <= start <= end <= 10_000_000 for _, start, end in crowded)


def test_no_traces_without_an_endpoint_or_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(tracing_from_environment(), NoTracing)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracing = tracing_from_environment()
    assert isinstance(tracing, OpenTelemetry)
    tracing.close()
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    assert isinstance(tracing_from_environment(), NoTracing)
