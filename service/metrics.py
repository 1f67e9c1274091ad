"""All Prometheus metrics of the service. Each app has its own registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from camcal.models.bundle import GROUPS

STAGES = ("decode", "queue", "inference", "post", "store", "render")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_STAGE_SECONDS = (0.0001, 0.00025, 0.0005, *_SECONDS)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SHARES = tuple(i / 10 for i in range(1, 10)) + (0.95, 0.99, 1.0)
_SHIFTS = (-0.5, -0.25, -0.1, -0.05, -0.01, 0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """One attribute per metric."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        self.requests = Counter(
            "camcal_requests_total", "Requests by route and status code", ["route", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "camcal_request_duration_seconds",
            "Time from request to response",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "camcal_stage_duration_seconds",
            "Time per processing stage of a request",
            ["stage"],
            buckets=_STAGE_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("camcal_in_flight", "Requests in progress", registry=registry)
        self.ready = Gauge("camcal_ready", "1 if ready, 0 during startup and while draining", registry=registry)
        self.workers = Gauge("camcal_workers", "Configured worker processes (CAMCAL_WORKERS)", registry=registry)
        self.cancelled = Counter(
            "camcal_cancelled_total", "Requests whose client disconnected before the response", registry=registry
        )
        self.rejected = Counter(
            "camcal_rejected_total",
            "Requests rejected by overload, rate limit, deadline or readiness",
            ["reason"],
            registry=registry,
        )
        for reason in ("queue_full", "queue_bytes", "client_full", "client_bytes", "rate_limited"):
            self.rejected.labels(reason)
        for reason in ("large_images", "deadline", "not_ready", "memory"):
            self.rejected.labels(reason)

        self.large_images = Counter(
            "camcal_large_images_total", "Images decoded in the separate process for large images", registry=registry
        )
        self.unauthorized = Counter(
            "camcal_unauthorized_total", "Requests rejected by the API key check", ["reason"], registry=registry
        )
        for reason in ("missing", "wrong", "wait", "route"):
            self.unauthorized.labels(reason)

        self.batch_size = Histogram("camcal_batch_size", "Images per batch", buckets=_BATCH_SIZES, registry=registry)
        self.batch_padding = Counter("camcal_batch_padding_total", "Padding images added to batches", registry=registry)
        self.queue_depth = Gauge("camcal_queue_depth", "Requests waiting for the model", registry=registry)
        self.queue_bytes = Gauge("camcal_queue_bytes", "Bytes of request bodies in memory", registry=registry)
        self.queue_limit = Gauge("camcal_queue_limit", "Queue size (CAMCAL_QUEUE_LIMIT)", registry=registry)

        self.failures = Counter(
            "camcal_model_failures_total",
            "Failed inference: errors, invalid outputs (answer) and failures after inference (after)",
            ["reason"],
            registry=registry,
        )
        for reason in ("error", "answer", "after"):
            self.failures.labels(reason)

        self.model_info = Gauge(
            "camcal_model_info", "Model in use", ["name", "version", "provider", "classes"], registry=registry
        )
        self.device_fallback = Gauge(
            "camcal_device_fallback", "1 if running on the CPU because the GPU failed to start", registry=registry
        )

        self.reloads = Counter(
            "camcal_reloads_total",
            "Model reloads by result",
            ["result"],
            registry=registry,
        )
        for result in ("done", "failed"):
            self.reloads.labels(result)

        self.store_entries = Gauge("camcal_cam_store_entries", "Heatmaps in the store", registry=registry)
        self.store_bytes = Gauge("camcal_cam_store_bytes", "Bytes of heatmaps in the store", registry=registry)
        self.store_evictions = Counter(
            "camcal_cam_store_evictions_total", "Heatmaps removed from the store", ["reason"], registry=registry
        )
        self.store_reads = Counter(
            "camcal_cam_store_reads_total", "Heatmap lookups: hit or miss", ["result"], registry=registry
        )
        self.store_failures = Counter(
            "camcal_cam_store_failures_total", "Failed store operations", ["operation"], registry=registry
        )
        for reason in ("expired", "full", "deleted"):
            self.store_evictions.labels(reason)
        for result in ("hit", "miss"):
            self.store_reads.labels(result)
        for operation in ("put", "get", "delete"):
            self.store_failures.labels(operation)

        self.predictions = Counter(
            "camcal_predictions_total", "Predictions by the group of the top class", ["group"], registry=registry
        )
        self.confidence = Histogram(
            "camcal_calibrated_confidence",
            "Calibrated probability of the top class",
            ["group"],
            buckets=_SHARES,
            registry=registry,
        )
        self.shift = Histogram(
            "camcal_calibration_shift",
            "Calibrated minus uncalibrated probability of the top class",
            buckets=_SHIFTS,
            registry=registry,
        )
        for group in GROUPS:
            self.predictions.labels(group)
            self.confidence.labels(group)
        for stage in STAGES:
            self.stage_seconds.labels(stage)

    def render(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _Families(Collector):
    """Parsed metrics, to be registered in another registry."""

    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def joined(texts: Mapping[int, bytes]) -> bytes:
    """Merge the `Metrics.render` texts of several workers into one, with a label `worker`.

    Summing over the workers instead would let a counter fall when a worker ends. Prometheus takes that for a reset and
    counts the remaining sum again.
    """
    families: dict[str, Metric] = {}
    for worker, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            samples = [sample._replace(labels=sample.labels | {"worker": str(worker)}) for sample in family.samples]
            first = families.setdefault(family.name, family)
            first.samples = samples if first is family else first.samples + samples
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


def server_timing(stages: Mapping[str, float]) -> str:
    """The `Server-Timing` header for the duration of each stage, in seconds."""
    return ", ".join(f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in stages.items())
