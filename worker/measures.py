"""The worker's own metrics, as `contract.metrics` names them, in a registry of its own."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from broker.store import Store
from contract import metrics
from contract.card import ModelCard
from contract.exposition import counter, family, histogram, new_registry
from contract.spec import JobSpec, Timings
from models.latent_diffusion import LatentDiffusion
from worker import health
from worker.engine.engine import Engine
from worker.engine.events import LaneTicked
from worker.engine.scheduler import LaneKey

_MAX_LANES: Final = 64
"""Shown apart; a lane is some 35 series."""


class WorkerMetrics:
    def __init__(self) -> None:
        registry = self.registry = new_registry()
        self.pulse = health.Pulse()
        self._lanes: set[LaneKey] = set()
        self._ticks = counter(metrics.TICKS, registry)
        self._rows = histogram(metrics.ROWS_PER_TICK, registry)
        self._slots = counter(metrics.TICK_SLOTS, registry)
        self._tick_seconds = histogram(metrics.TICK_SECONDS, registry)
        self._stage_seconds = histogram(metrics.STAGE_SECONDS, registry)
        ProcessCollector(metrics.PROCESS_NAMESPACE, registry=registry)

    def watch(self, engine: Engine, served: Sequence[tuple[ModelCard, LatentDiffusion]], store: Store) -> None:
        """From now on these are asked at every scrape, and all that may happen to the models' jobs is there with 0."""
        self.registry.register(_Figures(engine, {card.name: model for card, model in served}, store))
        for card, _ in served:
            for task in card.tasks:
                for stage in Timings.model_fields:
                    self._stage_seconds.labels(card.name, task, stage)

    def ticked(self, tick: LaneTicked) -> None:
        labels = (tick.lane.model, self._label(tick.lane))
        self._ticks.labels(*labels).inc()
        self._rows.labels(*labels).observe(tick.rows)
        self._slots.labels(*labels).inc(tick.bucket)
        self._tick_seconds.labels(*labels).observe(tick.seconds)

    def _label(self, lane: LaneKey) -> str:
        """Callers choose sizes: the lanes that come after the first `_MAX_LANES` are one for Prometheus."""
        if len(self._lanes) < _MAX_LANES:
            self._lanes.add(lane)
        return lane.label if lane in self._lanes else "other"

    def succeeded(self, spec: JobSpec, timings: Timings) -> None:
        for stage, seconds in timings:
            self._stage_seconds.labels(spec.model, spec.task.value, stage).observe(seconds)

    def serve(self, host: str, port: int) -> int:
        """Answers on /metrics and /healthz in threads; returns the port, which is a free one for port 0."""
        return health.serve(self.registry, self.pulse.check, host, port)


class _Figures(Collector):
    """What is read at scrape time, from the server's thread: nothing here may change or wait for the engine."""

    def __init__(self, engine: Engine, models: Mapping[str, LatentDiffusion], store: Store) -> None:
        self._engine = engine
        self._models = models
        self._store = store

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        yield family(metrics.OUT_OF_MEMORY, (((model,), count) for model, count in self._engine.shortages.items()))
        yield family(metrics.STORE_ERRORS, (((name,), count) for name, count in self._store.errors.items()))
        yield family(metrics.WORKER_INFO, ((self._described(name), 1) for name in self._models))
        yield family(metrics.DEVICE_MEMORY, self._device_memory())

    def _described(self, name: str) -> tuple[str, str, str, str]:
        model = self._models[name]
        dtype = str(model.unet.conv_in.weight.dtype).removeprefix("torch.")
        return name, self._engine.fingerprint, dtype, str(model.device)

    def _device_memory(self) -> Iterator[tuple[tuple[str, str], float]]:
        for device in {model.device for model in self._models.values() if model.device.type == "cuda"}:
            yield (str(device), "allocated"), torch.cuda.memory_allocated(device)
            yield (str(device), "reserved"), torch.cuda.memory_reserved(device)
            yield (str(device), "total"), torch.cuda.get_device_properties(device).total_memory
