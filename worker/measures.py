"""The worker's own metrics, as `contract.metrics` names them, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from contract import metrics
from contract.metrics import Metric
from contract.spec import JobSpec, Timings
from worker import health
from worker.engine.events import LaneTicked


class WorkerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.pulse = health.Pulse()
        ticks = metrics.TICKS
        self._ticks = Counter(ticks.name, ticks.help, ticks.labels, registry=self.registry)
        self._rows = self._histogram(metrics.ROWS_PER_TICK)
        self._tick_seconds = self._histogram(metrics.TICK_SECONDS)
        self._stage_seconds = self._histogram(metrics.STAGE_SECONDS)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)

    def ticked(self, tick: LaneTicked) -> None:
        labels = (tick.lane.model, tick.lane.label)
        self._ticks.labels(*labels).inc()
        self._rows.labels(*labels).observe(tick.rows)
        self._tick_seconds.labels(*labels).observe(tick.seconds)

    def succeeded(self, spec: JobSpec, timings: Timings) -> None:
        for stage, seconds in timings:
            self._stage_seconds.labels(spec.model, spec.task.value, stage).observe(seconds)

    def serve(self, host: str, port: int) -> int:
        """Answers on /metrics and /healthz in threads; returns the port, which is a free one for port 0."""
        return health.serve(self.registry, self.pulse, host, port)
