"""What `/metrics` shows: this process's HTTP figures, and the counters and gauges that all gateways read from Redis."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from broker.connection import REDIS_UNAVAILABLE
from broker.gateway_side import JobBroker
from contract import keys, metrics
from contract.spec import Priority

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class RedisFigures:
    """One reading. Every gateway exports the same values: take the max over replicas, never the sum."""

    counters: Mapping[str, int]
    queue_depths: Mapping[tuple[str, Priority], int]
    running: int
    workers: Mapping[str, int] = field(default_factory=dict)


async def read_figures(broker: JobBroker) -> RedisFigures:
    """Models without a live worker are shown with 0. Raises what redis raises."""
    workers = {card.name: 0 for card in await broker.cards()}
    for worker in await broker.workers():
        for model in worker.models:
            workers[model] = workers.get(model, 0) + 1
    return RedisFigures(await broker.counters(), await broker.queue_depths(), await broker.running(), workers)


class _RedisCollector(Collector):
    def __init__(self, figures: RedisFigures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for metric in metrics.REDIS_COUNTERS:
            family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
            prefix = keys.counter(metric.name, "")
            for name, value in sorted(self._figures.counters.items()):
                if name.startswith(prefix):
                    family.add_metric(name.removeprefix(prefix).split("|"), value)
            yield family
        depth = GaugeMetricFamily(metrics.QUEUE_DEPTH.name, metrics.QUEUE_DEPTH.help, labels=metrics.QUEUE_DEPTH.labels)
        for (model, priority), waiting in self._figures.queue_depths.items():
            depth.add_metric([model, priority.value], waiting)
        yield depth
        yield GaugeMetricFamily(metrics.RUNNING.name, metrics.RUNNING.help, self._figures.running)
        workers = GaugeMetricFamily(metrics.WORKERS.name, metrics.WORKERS.help, labels=metrics.WORKERS.labels)
        for model, live in self._figures.workers.items():
            workers.add_metric([model], live)
        yield workers


class GatewayMetrics:
    """Of one app, in a registry of its own: two apps in one process count apart."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        http, seconds = metrics.HTTP_REQUESTS, metrics.HTTP_SECONDS
        self._requests = Counter(http.name, http.help, http.labels, registry=self._registry)
        self._seconds = Histogram(
            seconds.name, seconds.help, seconds.labels, buckets=seconds.buckets, registry=self._registry
        )
        self._followers = Gauge(metrics.SSE_CLIENTS.name, metrics.SSE_CLIENTS.help, registry=self._registry)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answered request; `seconds` until its headers, `route` as declared (never the path as sent)."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    async def exposition(self, broker: JobBroker) -> bytes:
        """Prometheus' text format. While Redis is away, only what this process knows itself."""
        self._followers.set(broker.followers)
        own = generate_latest(self._registry)
        try:
            figures = await read_figures(broker)
        except REDIS_UNAVAILABLE:
            return own
        registry = CollectorRegistry()
        registry.register(_RedisCollector(figures))
        return own + generate_latest(registry)
