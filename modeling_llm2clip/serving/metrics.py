"""Counters and histograms of the server, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .service import EmbeddingService

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ServerMetrics:
    """The metrics of one service, in a registry of their own; counts its batches."""

    def __init__(self, service: EmbeddingService) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "llm2clip_requests", "Requests by route and status.", ("route", "status"),
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "llm2clip_request_seconds", "Seconds from the first byte to the answer.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._inputs = Counter(
            "llm2clip_inputs", "Texts and images that were embedded.", ("modality",),
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter("llm2clip_tokens", "Tokens that were read.", registry=registry)
        self._batch_size = Histogram(
            "llm2clip_batch_size", "Inputs per batch.", ("modality",), buckets=_SIZES,
            registry=registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "llm2clip_batch_seconds", "Seconds per batch.", ("modality",), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        pending = Gauge(
            "llm2clip_pending_inputs", "Texts and images in work and waiting.", registry=registry
        )
        pending.set_function(lambda: service.num_pending)
        service.on_batch = self._count_batch

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def _count_batch(self, modality: str, count: int, cost: int, seconds: float) -> None:
        self._inputs.labels(modality).inc(count)
        self._batch_size.labels(modality).observe(count)
        self._batch_seconds.labels(modality).observe(seconds)
        if modality == "text":
            self._tokens.inc(cost)
