"""Prometheus metrics. Low-cardinality labels only: never a request id, never a raw path."""

from __future__ import annotations

import asyncio
import collections
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, Self, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.artifacts.manifest import Capability
from app.batching.batcher import BatchRecord
from app.fleet import Fleet

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_COUNT_AFTER_S = 0.02

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MODEL = ("model", "version", "capability")


class _Histogram(Histogram):
    def observe_many(self, amounts: Sequence[float]) -> None:
        """Observes all of them at the price of one: each value of a metric that is written locks, and with several
        workers goes to a file.
        """
        self._raise_if_not_observable()  # type: ignore[no-untyped-call]  # prometheus_client's
        self._sum.inc(sum(amounts))
        for index, count in collections.Counter(bisect_left(self._upper_bounds, amount) for amount in amounts).items():
            self._buckets[index].inc(count)


@dataclass
class ModelCounts:
    """What one version of a model has done since the service began, over all workers; times in seconds."""

    answered: int = 0
    failed: int = 0
    items: int = 0
    batches: int = 0
    waits: int = 0
    last_answered_at: float = 0.0
    answered_s: float = 0.0
    failed_s: float = 0.0
    decode_s: float = 0.0
    queue_s: float = 0.0
    run_s: float = 0.0
    encode_s: float = 0.0


class Inference:
    """One request for a model, measured while it is open; what raises counts as failed."""

    __slots__ = ("_count", "_started", "decode_s", "encode_s", "has_failed", "items", "key", "seconds")

    def __init__(self, key: tuple[str, int], count: Callable[[Inference], None]) -> None:
        self.key = key
        self._count = count
        self._started = time.perf_counter()
        self.seconds = 0.0
        self.has_failed = False
        self.items = 0
        self.decode_s = 0.0
        self.encode_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._started
        self.has_failed = error is not None
        self._count(self)


class Metrics:
    """The metrics of one service, in a registry of their own.

    Several workers count into files that they share, so that each of them can answer for all.

    Args:
        fleet: the workers, for what is a state and not a count.
    """

    def __init__(self, fleet: Callable[[], Fleet]) -> None:
        self._fleet = fleet
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "hourglass_http_requests",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._request_seconds = _Histogram(
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
        self._batches = _Histogram(
            "hourglass_batch_rows", "Rows of each batch.", _MODEL, buckets=_ROWS, registry=self.registry
        )
        self._queue_seconds = _Histogram(
            "hourglass_queue_seconds",
            "How long a request waited for its first batch.",
            _MODEL,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._run_seconds = _Histogram(
            "hourglass_run_seconds",
            "How long a batch took on the device, transfers included.",
            _MODEL,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._changes = Counter(
            "hourglass_model_changes",
            "Versions that were loaded, verified alone, refused, evicted or unloaded.",
            ("model", "change"),
            registry=self.registry,
        )
        self._load_seconds = _Histogram(
            "hourglass_model_load_seconds",
            "How long it took until a version was loaded, tested and warm.",
            buckets=(*_SECONDS, 30.0, 60.0, 120.0),
            registry=self.registry,
        )
        model = ("model", "version")
        self._model_requests = Counter(
            "hourglass_model_requests",
            "Requests for a model: answered, or failed.",
            (*model, "outcome"),
            registry=self.registry,
        )
        self._model_items = Counter(
            "hourglass_model_items", "Items of the requests that a model answered.", model, registry=self.registry
        )
        self._model_seconds = Counter(
            "hourglass_model_request_seconds",
            "Time of requests for a model: answered and failed ones as a whole, and decoding and encoding of those.",
            (*model, "part"),
            registry=self.registry,
        )
        self._model_last = Gauge(
            "hourglass_model_last_answer_timestamp_seconds",
            "When the model last answered.",
            model,
            registry=self.registry,
            multiprocess_mode="max",
        )
        self._answered: list[tuple[str, str, int, float]] = []  # method, route, status, seconds; not counted yet
        self._inferences: list[Inference] = []
        self._ran: list[tuple[tuple[str, int, Capability], BatchRecord]] = []
        self._is_scheduled = False
        self._inference_children = lru_cache(maxsize=512)(self._inference_counters)
        self._batch_children = lru_cache(maxsize=512)(self._batch_metrics)
        # Looking labels up costs more than counting; methods and statuses come from outside, so not without bound.
        self._request_children = lru_cache(maxsize=512)(
            lambda method, route, status: (
                self._requests.labels(method, route, str(status)),
                self._request_seconds.labels(route),
            )
        )

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._answered.append((method, route, status, seconds))
        if not self._is_scheduled:
            self._schedule_count()

    def inference(self, model: str, version: int) -> Inference:
        """Measures a request for a model as long as it is open."""
        return Inference((model, version), self._observe_inference)

    def _observe_inference(self, inference: Inference) -> None:
        self._inferences.append(inference)
        if not self._is_scheduled:
            self._schedule_count()

    def _schedule_count(self) -> None:
        """Counts what was seen a moment later, or when somebody asks: a counter costs as much for one as for all."""
        try:
            asyncio.get_running_loop().call_later(_COUNT_AFTER_S, self._count_seen)
        except RuntimeError:  # no loop runs
            self._count_seen()
        else:
            self._is_scheduled = True

    def _count_seen(self) -> None:
        self._is_scheduled = False
        answered, self._answered = self._answered, []
        inferences, self._inferences = self._inferences, []
        ran, self._ran = self._ran, []
        for labels, records in _grouped(ran, lambda batch: batch[0]):
            rows, failed_rows, batch_rows, run_seconds, queue_seconds = self._batch_children(*labels)
            rows.inc(sum(record.rows for _, record in records))
            if failed := sum(record.failed_rows for _, record in records):
                failed_rows.inc(failed)
            batch_rows.observe_many([record.rows for _, record in records])
            run_seconds.observe_many([record.ran_s for _, record in records])
            queue_seconds.observe_many([wait_s for _, record in records for wait_s in record.waits_s])
        for (method, route, status), found in _grouped(answered, lambda request: request[:3]):
            counter, histogram = self._request_children(method, route, status)
            counter.inc(len(found))
            histogram.observe_many([seconds for *_, seconds in found])
        for (key, has_failed), measured in _grouped(
            inferences, lambda inference: (inference.key, inference.has_failed)
        ):
            answers, failures, items, answers_s, failures_s, decode_s, encode_s, last = self._inference_children(*key)
            seconds = sum(inference.seconds for inference in measured)
            if has_failed:
                failures.inc(len(measured))
                failures_s.inc(seconds)
                continue
            answers.inc(len(measured))
            answers_s.inc(seconds)
            items.inc(sum(inference.items for inference in measured))
            decode_s.inc(sum(inference.decode_s for inference in measured))
            encode_s.inc(sum(inference.encode_s for inference in measured))
            last.set_to_current_time()

    def _inference_counters(self, model: str, version: int) -> tuple[Any, ...]:
        labels = (model, str(version))
        return (
            *(self._model_requests.labels(*labels, outcome) for outcome in ("answered", "failed")),
            self._model_items.labels(*labels),
            *(self._model_seconds.labels(*labels, part) for part in ("answered", "failed", "decode", "encode")),
            self._model_last.labels(*labels),
        )

    def observe_batch(self, model: str, version: int, capability: Capability, record: BatchRecord) -> None:
        """Counts a batch that ran."""
        self._ran.append(((model, version, capability), record))
        if not self._is_scheduled:
            self._schedule_count()

    def _batch_metrics(self, model: str, version: int, capability: Capability) -> tuple[Any, ...]:
        labels = (model, str(version), str(capability))
        metrics = (self._rows, self._failed_rows, self._batches, self._run_seconds, self._queue_seconds)
        return tuple(metric.labels(*labels) for metric in metrics)

    def observe_change(self, model: str, version: int, change: str, seconds: float) -> None:
        """Counts a version that was loaded, verified, refused, evicted or unloaded; forgets the unloaded one's own."""
        self._changes.labels(model, change).inc()
        if change == "loaded":
            self._load_seconds.observe(seconds)
        # Files that several processes share cannot forget; one process must, or every reload would leave something.
        if change == "unloaded" and MULTIPROCESS_VARIABLE not in os.environ:
            self._count_seen()  # or what was seen of it a moment ago would bring it back
            for metric in (
                self._rows,
                self._failed_rows,
                self._batches,
                self._queue_seconds,
                self._run_seconds,
                self._model_requests,
                self._model_items,
                self._model_seconds,
                self._model_last,
            ):
                metric.remove_by_labels({"model": model, "version": str(version)})
            self._inference_children.cache_clear()
            self._batch_children.cache_clear()

    def model_counts(self) -> dict[tuple[str, int], ModelCounts]:
        """What each version of each model has done, over all workers."""
        counts: dict[tuple[str, int], ModelCounts] = {}
        for family in self._counts().collect():
            for sample in family.samples:
                field = _COUNTED.get((sample.name, sample.labels.get("outcome") or sample.labels.get("part")))
                if field is None:
                    continue
                key = (sample.labels["model"], int(sample.labels["version"]))
                found = counts.setdefault(key, ModelCounts())
                before = getattr(found, field)
                setattr(found, field, before + type(before)(sample.value))
        return counts

    def _counts(self) -> CollectorRegistry:
        """The registry of all workers together."""
        self._count_seen()
        if MULTIPROCESS_VARIABLE not in os.environ:
            return self.registry
        counts = CollectorRegistry()
        MultiProcessCollector(counts)  # type: ignore[no-untyped-call]  # the library types nothing
        return counts

    def exposition(self) -> bytes:
        """Every metric in Prometheus' text format, over all workers."""
        counts = self._counts()
        states = CollectorRegistry()
        states.register(_States(self._fleet()))
        return generate_latest(counts) + generate_latest(states)


def _grouped(found: list[T], key: Callable[[T], K]) -> Iterable[tuple[K, list[T]]]:
    groups: dict[K, list[T]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups.items()


_COUNTED = {
    ("hourglass_model_requests_total", "answered"): "answered",
    ("hourglass_model_requests_total", "failed"): "failed",
    ("hourglass_model_items_total", None): "items",
    ("hourglass_model_request_seconds_total", "answered"): "answered_s",
    ("hourglass_model_request_seconds_total", "failed"): "failed_s",
    ("hourglass_model_request_seconds_total", "decode"): "decode_s",
    ("hourglass_model_request_seconds_total", "encode"): "encode_s",
    ("hourglass_model_last_answer_timestamp_seconds", None): "last_answered_at",
    ("hourglass_batch_rows_count", None): "batches",
    ("hourglass_queue_seconds_count", None): "waits",
    ("hourglass_queue_seconds_sum", None): "queue_s",
    ("hourglass_run_seconds_sum", None): "run_s",
}


class _States(Collector):
    """What is so now, read when asked, so that it cannot go stale."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        snapshots = [snapshot for snapshot in self._fleet.snapshots() if snapshot is not None]
        yield GaugeMetricFamily("hourglass_queue_rows", "Rows that wait.", self._fleet.waiting_rows)
        ready = not self._fleet.reasons_not_ready()
        yield GaugeMetricFamily("hourglass_ready", "1 while the service is ready.", float(ready))
        yield GaugeMetricFamily("hourglass_workers", "Worker processes that answer.", len(snapshots))
        yield CounterMetricFamily(
            "process_cpu_seconds", "CPU time of all workers, in seconds.", sum(s.cpu_s for s in snapshots)
        )
        yield GaugeMetricFamily(
            "process_resident_memory_bytes", "Memory of all workers.", sum(s.resident_bytes for s in snapshots)
        )
        yield GaugeMetricFamily(
            "hourglass_model_memory_bytes",
            "Parameters and buffers of the models in memory, over all workers.",
            sum(s.model_bytes for s in snapshots),
        )
        family = GaugeMetricFamily(
            "hourglass_model_state", "1 for the state that the version is in.", labels=("model", "version", "state")
        )
        for found in self._fleet.versions().values():
            family.add_metric((found.name, str(found.version), found.state), 1)
        yield family
        yield from self._drift()

    def _drift(self) -> Iterator[Metric]:
        labels = ("model", "version")
        items = GaugeMetricFamily("hourglass_drift_items", "Recent p-values that drift is measured on.", labels=labels)
        statistic = GaugeMetricFamily(
            "hourglass_drift_statistic",
            "Distance of recent p-values from those of normal items, 0 to 1 (Kolmogorov-Smirnov).",
            labels=labels,
        )
        p_value = GaugeMetricFamily(
            "hourglass_drift_p_value", "How often normal items come to that distance.", labels=labels
        )
        for (name, version), drift in self._fleet.drifts().items():
            for family, value in ((items, drift.items), (statistic, drift.statistic), (p_value, drift.p_value)):
                family.add_metric((name, str(version)), value)
        yield from (items, statistic, p_value)
