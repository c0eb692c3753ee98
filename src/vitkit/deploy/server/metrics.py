"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One server's numbers, in a registry of their own, so that two servers in a process do not mix."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "vitkit_requests", "Requests by route, method and status.", ("path", "method", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "vitkit_request_seconds",
            "From the first byte to the answer.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter("vitkit_images", "Images by outcome: ok or unreadable.", ("outcome",), registry=registry)
        self.batch_images = Histogram(
            "vitkit_batch_images", "Images run at once.", buckets=[2**i for i in range(11)], registry=registry
        )
        self.model_seconds = Histogram(
            "vitkit_model_seconds", "One run of the model.", buckets=_SECONDS, registry=registry
        )
        self._waiting = Gauge("vitkit_waiting_images", "Accepted and not answered yet.", registry=registry)

    def watch_waiting(self, count: Callable[[], int]) -> None:
        """Ask ``count`` for the number of waiting images whenever the numbers are read."""
        self._waiting.set_function(count)

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)
