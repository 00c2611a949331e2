"""The server's metrics, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server. Adapters are counted together, because thousands of labels would be too many."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "lightning_peft_requests", "Requests by route and HTTP status", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "lightning_peft_request_seconds",
            "Seconds from a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._rows = Histogram(
            "lightning_peft_batch_rows", "Rows that ran together", buckets=_ROWS, registry=self._registry
        )
        self.tokens = Counter("lightning_peft_generated_tokens", "Generated tokens", registry=self._registry)
        self.active = Gauge("lightning_peft_active_requests", "Requests that run or wait", registry=self._registry)
        self._loaded = Gauge("lightning_peft_adapters_loaded", "Adapters in memory", registry=self._registry)
        self._bytes = Gauge("lightning_peft_adapters_bytes", "Bytes of the adapters in memory", registry=self._registry)

    def finished(self, route: str, status: int, seconds: float) -> None:
        """Count a request that got its whole answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def engine(self, batch_rows: int, adapters: int, nbytes: int) -> None:
        """Add the numbers that the model's process sends with each answer."""
        if batch_rows:
            self._rows.observe(batch_rows)
        self._loaded.set(adapters)
        self._bytes.set(nbytes)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
