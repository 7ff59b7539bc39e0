"""OpenTelemetry traces, where its packages are installed and OTEL_EXPORTER_OTLP_ENDPOINT says where they go.

One server span a request, and below it what its pictures went through: queue, text, denoise, decode, encode. The
engine measures stages per batch and tells them afterwards, so those spans are laid end to end before the moment at
which the pictures were there; their lengths are measured, their order is given.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.types import Scope

from tdm_app.logs import request_id
from tdm_serve import GeneratedImage

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
STAGES = ("text", "denoise", "decode")


class Span(Protocol):
    """A request under way."""

    def end(self, route: str, status: int) -> None: ...
    def stages(self, spans: Sequence[tuple[str, int, int]]) -> None: ...


class Tracing(Protocol):
    """Where spans begin."""

    def request(self, scope: Scope) -> contextlib.AbstractContextManager[Span]: ...
    def close(self) -> None: ...


class NoSpan:
    """Does nothing."""

    def end(self, route: str, status: int) -> None:
        """Does nothing."""

    def stages(self, spans: Sequence[tuple[str, int, int]]) -> None:
        """Does nothing."""


class NoTracing:
    """Does nothing."""

    def request(self, scope: Scope) -> contextlib.AbstractContextManager[Span]:
        """A span that does nothing."""
        del scope
        return contextlib.nullcontext(NoSpan())

    def close(self) -> None:
        """Does nothing."""


class OpenTelemetry:
    """Spans for a tracer provider of opentelemetry's SDK, which `close` flushes and shuts down."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer: Any = provider.get_tracer("tdm_app")
        self._propagator: Any = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def request(self, scope: Scope) -> Generator[Span]:
        """The span of one request, a child of the client's where it sent a `traceparent`."""
        from opentelemetry.trace import SpanKind

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = self._propagator.extract(carrier)
        attributes = {"http.request.method": scope["method"], "tdm_serve.request_id": request_id.get()}
        span = self._tracer.start_span(scope["method"], parent, SpanKind.SERVER, attributes)
        mine = _Span(self._tracer, span)
        scope.setdefault("state", {})["span"] = mine
        try:
            yield mine
        finally:
            span.end()

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


class _Span:
    """One request's span. The path itself is no attribute: it may hold the ids of pictures and jobs."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span

    def end(self, route: str, status: int) -> None:
        """What became of the request."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.route", route)
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def stages(self, spans: Sequence[tuple[str, int, int]]) -> None:
        """Children by name, start and end, in nanoseconds since 1970."""
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(self._span)
        for name, start_ns, end_ns in spans:
            self._tracer.start_span(name, inside, start_time=start_ns).end(end_ns)


def trace_pictures(request: Request, pictures: Sequence[GeneratedImage], asked_ns: int, made_ns: int) -> None:
    """Adds the stages of a request whose pictures were asked for and there at these times, and encoded by now."""
    span: Span | None = getattr(request.state, "span", None)
    if span is not None:
        longest = max((picture.timings_ms for picture in pictures), key=lambda timings: sum(timings.values()))
        span.stages([*stages_of(longest, asked_ns, made_ns), ("encode", made_ns, time.time_ns())])


def stages_of(timings_ms: Mapping[str, float], asked_ns: int, made_ns: int) -> list[tuple[str, int, int]]:
    """Queue, then the stages end to end, up to `made_ns`."""
    spans: list[tuple[str, int, int]] = []
    end = made_ns
    for stage in reversed(STAGES):
        start = max(asked_ns, end - round(timings_ms.get(stage, 0.0) * 1e6))
        spans.append((stage, start, end))
        end = start
    return [("queue", asked_ns, end), *reversed(spans)]


def tracing_from_environment() -> Tracing:
    """What the environment asks for, through OpenTelemetry's own variables."""
    if not any(os.environ.get(name) for name in ENDPOINTS) or not _installed():
        return NoTracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", "tdm-serve")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OpenTelemetry(provider)


def _installed() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in PACKAGES)
    except ModuleNotFoundError:  # a parent package is missing
        return False
