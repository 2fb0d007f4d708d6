"""What `/metrics` shows: this process's HTTP figures, and the counters and gauges that all gateways read from Redis."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from prometheus_client import Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from broker.connection import REDIS_UNAVAILABLE
from broker.gateway_side import JobBroker
from contract import keys, metrics
from contract.card import ModelCard
from contract.errors import ErrorCode
from contract.exposition import counter, family, gauge, histogram, new_registry
from contract.metrics import Metric
from contract.spec import JobStatus, Priority

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PATIENCE_SECONDS: Final = 3.0
"""For Redis; scrapers give up after some seconds more."""

_Family = CounterMetricFamily | GaugeMetricFamily


@dataclass(frozen=True)
class RedisFigures:
    """One reading. Every gateway exports the same values: take the max over replicas, never the sum."""

    counters: Mapping[str, int]
    queue_depths: Mapping[tuple[str, Priority], int]
    queue_ages: Mapping[tuple[str, Priority], float]
    running: int
    workers: Mapping[str, int]
    cards: Sequence[ModelCard]


async def read_figures(broker: JobBroker) -> RedisFigures:
    """Models without a live worker are shown with 0. Raises what redis raises."""
    cards = await broker.cards()
    workers = {card.name: 0 for card in cards}
    for worker in await broker.workers():
        for model in worker.models:
            workers[model] = workers.get(model, 0) + 1
    depths, ages = await broker.queue_depths(), await broker.queue_ages()
    return RedisFigures(await broker.counters(), depths, ages, await broker.running(), workers, cards)


class _RedisCollector(Collector):
    def __init__(self, figures: RedisFigures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[_Family]:
        figures = self._figures
        for metric in metrics.REDIS_COUNTERS:
            yield family(metric, self._counted(metric).items())
        for metric, by_queue in (
            (metrics.QUEUE_DEPTH, figures.queue_depths),
            (metrics.QUEUE_OLDEST, figures.queue_ages),
        ):
            yield family(metric, (((model, priority), value) for (model, priority), value in by_queue.items()))
        yield family(metrics.RUNNING, [((), figures.running)])
        yield family(metrics.WORKERS, (((model,), live) for model, live in figures.workers.items()))

    def _counted(self, metric: Metric) -> dict[tuple[str, ...], float]:
        """By label values. What has not happened yet is there with 0, or its first time would show no increase."""
        counted: dict[tuple[str, ...], float] = {}
        for card in self._figures.cards:
            counted |= dict.fromkeys(product(*(_values(label, card) for label in metric.labels)), 0)
        prefix = keys.counter(metric.name, "")
        for name, value in sorted(self._figures.counters.items()):
            if name.startswith(prefix):
                counted[tuple(name.removeprefix(prefix).split("|"))] = value
        return counted


def _values(label: str, card: ModelCard) -> Sequence[str]:
    """What a label may say about a model's jobs; all codes would be many series that stay at 0."""
    known: dict[str, Sequence[str]] = {
        "model": (card.name,),
        "task": card.tasks,
        "priority": tuple(Priority),
        "status": tuple(status for status in JobStatus if status.ended),
        "code": (ErrorCode.INTERNAL, ErrorCode.OUT_OF_MEMORY, ErrorCode.STORE_UNAVAILABLE, ErrorCode.WORKER_LOST),
    }
    return known[label]


class _StoreErrors(Collector):
    def __init__(self, errors: Mapping[str, int]) -> None:
        self._errors = errors

    def collect(self) -> Iterator[_Family]:
        yield family(metrics.STORE_ERRORS, (((operation,), count) for operation, count in self._errors.items()))


class GatewayMetrics:
    """Of one app, in a registry of its own: two apps in one process count apart."""

    def __init__(self) -> None:
        registry = self._registry = new_registry()
        self._requests = counter(metrics.HTTP_REQUESTS, registry)
        self._seconds = histogram(metrics.HTTP_SECONDS, registry)
        self._counted: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._problems = counter(metrics.HTTP_PROBLEMS, registry)
        for code in ErrorCode:
            self._problems.labels(code)
        self._followers = gauge(metrics.SSE_CLIENTS, registry)
        self._redis_up = gauge(metrics.REDIS_UP, registry)
        ProcessCollector(metrics.PROCESS_NAMESPACE, registry=registry)

    def count(self, method: str, route: str, status: int, seconds: float, problem: ErrorCode | None = None) -> None:
        """One answered request; `seconds` until its headers, `route` as declared (never the path as sent)."""
        requests, durations = self._children(method, route, status)
        requests.inc()
        durations.observe(seconds)
        if problem is not None:
            self._problems.labels(problem).inc()

    def _children(self, method: str, route: str, status: int) -> tuple[Counter, Histogram]:
        key = (method, route, status)
        if key not in self._counted:
            self._counted[key] = (
                self._requests.labels(method, route, str(status)), self._seconds.labels(method, route),
            )  # fmt: skip
        return self._counted[key]

    async def exposition(self, broker: JobBroker) -> bytes:
        """Prometheus' text format. While Redis is away, only what this process knows itself."""
        also = new_registry()
        also.register(_StoreErrors(broker.store.errors))
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                also.register(_RedisCollector(await read_figures(broker)))
            self._redis_up.set(1)
        except (TimeoutError, *REDIS_UNAVAILABLE):
            self._redis_up.set(0)
        self._followers.set(broker.followers)
        return generate_latest(self._registry) + generate_latest(also)
