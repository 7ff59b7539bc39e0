"""What `/metrics` shows, in Prometheus' text format and the naming style of the field's other servers.

The engine counts for itself; its numbers are read when somebody asks for them. Only HTTP is counted here. No label
ever holds what a client chooses: neither prompts nor users nor unknown paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tdm_serve import AsyncEngine
from tdm_serve.stats import EngineStats
from tdm_serve.stats import Histogram as Counted

PREFIX = "tdm_serve:"
HTTP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
FILLS = (1, 2, 4, 8, 16, 32, 64)  # pictures in a step
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The numbers of one service, in a registry of its own. `jobs` gives how many there are in each status."""

    def __init__(self, engine: AsyncEngine, jobs: Callable[[], Mapping[str, int]]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, file handles, CPU time
        self.registry.register(_Engine(engine, jobs))
        self._seconds = Histogram(
            f"{PREFIX}http_request_duration_seconds",
            "From a request's first byte to its answer's last.",
            ("method", "route", "status"),
            buckets=HTTP_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            f"{PREFIX}http_requests_in_flight", "Requests without a full answer.", registry=self.registry
        )
        self._retries = Counter(
            f"{PREFIX}http_client_retries", "Requests that say they are a retry.", registry=self.registry
        )

    def answered(self, method: str, route: str, status: int, seconds: float, *, retry: bool) -> None:
        """One request is over."""
        self._seconds.labels(method, route, str(status)).observe(seconds)
        if retry:
            self._retries.inc()

    def text(self) -> bytes:
        """The page. Cheap, but off the event loop it delays nobody."""
        return generate_latest(self.registry)


class _Engine(Collector):
    """Reads the engine's own count when asked."""

    def __init__(self, engine: AsyncEngine, jobs: Callable[[], Mapping[str, int]]) -> None:
        self._engine = engine
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        """All metrics of this moment."""
        stats = self._engine.stats()
        yield from _gauges(stats)
        yield from _counters(stats)
        yield from _histograms(stats)
        yield _labelled(GaugeMetricFamily, "jobs", "Jobs that have not ended.", "status", self._jobs())

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not ask the engine."""
        return ()


def _gauges(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("ready", "1 when the listed shapes are warm.", stats.ready)
    yield _gauge("degraded", "1 after the device thread had to be started again.", stats.degraded is not None)
    yield _gauge("num_pictures_waiting", "Pictures accepted and not started.", stats.waiting)
    yield _gauge("num_pictures_running", "Pictures started and not finished.", stats.running)
    yield _gauge("backlog_seconds", "Predicted, until everything accepted is done.", stats.backlog_ms / 1000)
    yield _gauge("prompt_cache_bytes", "Held by prompt embeddings.", stats.cache_bytes)
    versions = "Held by a loaded version beside the shared base."
    yield _labelled(GaugeMetricFamily, "model_memory_bytes", versions, "model", stats.version_bytes)
    memory = "Of the device, as its allocator counts."
    yield _labelled(GaugeMetricFamily, "device_memory_bytes", memory, "kind", stats.memory_bytes)


def _counters(stats: EngineStats) -> Iterator[Metric]:
    yield _counter("requests_accepted", "Requests that were promised a time.", stats.accepted)
    yield _counter("requests_finished", "Requests that got their pictures.", stats.finished)
    yield _counter("requests_cancelled", "Requests called off by their owner.", stats.cancelled)
    for name, help_text, counts in (
        ("requests_failed", "Accepted requests that got no pictures.", stats.failed),
        ("requests_refused", "Requests that were not accepted.", stats.refused),
    ):
        yield _labelled(CounterMetricFamily, name, help_text, "reason", counts)
    yield _labelled(CounterMetricFamily, "images", "Finished pictures.", "model", stats.images)
    evaluations = "Evaluations of one picture by the network."
    yield _labelled(CounterMetricFamily, "evaluations", evaluations, "model", stats.evaluations)
    yield _counter("steps", "Batched evaluations.", stats.steps)
    yield _counter("device_restarts", "Times that the device thread was started again.", stats.restarts)
    yield _counter("device_hangs", "Runs that took far longer than predicted.", stats.hangs)
    yield _counter("model_loads", "Times that a version's own weights came into memory.", stats.version_loads)
    yield _counter("model_unloads", "Times that they left it for others.", stats.version_unloads)
    yield _counter("prompt_cache_hits", "Prompts that needed no encoding.", stats.cache_hits)
    yield _counter("prompt_cache_misses", "Prompts that were encoded.", stats.cache_misses)


def _histograms(stats: EngineStats) -> Iterator[Metric]:
    pictures = sum(size * count for size, count in stats.batch_fill.items())
    counts = [sum(n for size, n in stats.batch_fill.items() if size <= bound) for bound in FILLS]
    fill = HistogramMetricFamily(f"{PREFIX}step_batch_size", "Pictures in a batched evaluation.")
    fill.add_metric((), [*_buckets(FILLS, counts), ("+Inf", stats.steps)], pictures)
    yield fill
    stages = HistogramMetricFamily(f"{PREFIX}stage_duration_seconds", "Of one batch.", labels=("stage",))
    for stage, counted in stats.stage_seconds.items():
        stages.add_metric((stage,), _cumulative(counted), counted.total)
    yield stages
    eta = HistogramMetricFamily(f"{PREFIX}eta_relative_error", "Predicted against actual time of finished requests.")
    eta.add_metric((), _cumulative(stats.eta_error), stats.eta_error.total)
    yield eta


def _cumulative(counted: Counted) -> list[tuple[str, float]]:
    *counts, everything = accumulate(counted.counts)
    return [*_buckets(counted.bounds, counts), ("+Inf", everything)]


def _buckets(bounds: Iterable[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    return [(str(float(bound)), count) for bound, count in zip(bounds, counts, strict=True)]


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, help_text, value=float(value))


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, help_text, value=value)


def _labelled(
    family: type[GaugeMetricFamily | CounterMetricFamily],
    name: str,
    help_text: str,
    label: str,
    values: Mapping[str, int],
) -> Metric:
    metric = family(PREFIX + name, help_text, labels=(label,))
    for key, value in values.items():
        metric.add_metric((key,), value)
    return metric
