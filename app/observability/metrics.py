"""Prometheus metrics. Low-cardinality labels only: never a request id, never a raw path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from app.artifacts.manifest import Capability
from app.batching.batcher import BatchRecord

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MODEL = ("model", "version", "capability")


class Metrics:
    """The metrics of one service, in a registry of their own.

    Args:
        waiting_rows: how many rows wait now.
        model_states: (name, version, state) of every artifact now.
        is_ready: whether the service is ready now.
    """

    def __init__(
        self,
        waiting_rows: Callable[[], int],
        model_states: Callable[[], Iterable[tuple[str, int, str]]],
        is_ready: Callable[[], bool],
    ) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = Counter(
            "hourglass_http_requests",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "hourglass_http_request_seconds",
            "From the request's first byte read to the answer's last byte written.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._rows = Counter("hourglass_rows", "Rows that went through a model.", _MODEL, registry=self.registry)
        self._failed_rows = Counter(
            "hourglass_failed_rows", "Rows that a model failed for.", _MODEL, registry=self.registry
        )
        self._batches = Histogram(
            "hourglass_batch_rows", "Rows of each batch.", _MODEL, buckets=_ROWS, registry=self.registry
        )
        self._queue_seconds = Histogram(
            "hourglass_queue_seconds",
            "How long a request waited for its first batch.",
            _MODEL,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._run_seconds = Histogram(
            "hourglass_run_seconds",
            "How long a batch took on the device, transfers included.",
            _MODEL,
            buckets=_SECONDS,
            registry=self.registry,
        )
        Gauge("hourglass_queue_rows", "Rows that wait.", registry=self.registry).set_function(waiting_rows)
        Gauge("hourglass_ready", "1 while the service is ready.", registry=self.registry).set_function(is_ready)
        self.registry.register(_ModelStates(model_states))

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def observe_batch(self, model: str, version: int, capability: Capability, record: BatchRecord) -> None:
        """Counts a batch that ran."""
        labels = (model, str(version), str(capability))
        self._rows.labels(*labels).inc(record.rows)
        if record.failed_rows:
            self._failed_rows.labels(*labels).inc(record.failed_rows)
        self._batches.labels(*labels).observe(record.rows)
        self._run_seconds.labels(*labels).observe(record.ran_s)
        queue_seconds = self._queue_seconds.labels(*labels)
        for wait_s in record.waits_s:
            queue_seconds.observe(wait_s)

    def exposition(self) -> bytes:
        """Every metric in Prometheus' text format."""
        return generate_latest(self.registry)


class _ModelStates(Collector):
    """One gauge per artifact and state, read when asked, so that it cannot go stale."""

    def __init__(self, model_states: Callable[[], Iterable[tuple[str, int, str]]]) -> None:
        self._model_states = model_states

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "hourglass_model_state", "1 for the state that the version is in.", labels=("model", "version", "state")
        )
        for name, version, state in self._model_states():
            family.add_metric((name, str(version), state), 1)
        yield family
