"""What a worker shows of itself: lack of memory, a store that fails, what it serves."""

from collections.abc import Callable

import pytest
import torch

from broker.gateway_side import JobBroker
from broker.store import Store
from contract import metrics
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobSpec
from tests.tiny_models import BASE, UPSCALER
from tests.worker.running import StartWorker, ended
from worker import measures
from worker.engine import runner
from worker.engine.events import LaneTicked
from worker.engine.scheduler import LaneKey

MakeSpec = Callable[..., JobSpec]


@pytest.mark.parametrize(("batching", "times"), [("exact", 2), ("fast", 1)])
async def test_every_lack_of_memory_counts(
    gateway: JobBroker,
    start_worker: StartWorker,
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
    batching: str,
    times: int,
) -> None:
    """In exact mode the same step is tried once more before the picture fails."""

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(runner, "step", exhausted)
    worker = start_worker(batching=batching, buckets=(1,))
    spec = make_spec()
    await gateway.submit(spec)
    record = await ended(gateway, spec)
    assert record.error is not None
    assert record.error.code is ErrorCode.OUT_OF_MEMORY
    count = worker.metrics.registry.get_sample_value
    assert count(metrics.OUT_OF_MEMORY.name, {"model": BASE}) == times
    assert count(metrics.OUT_OF_MEMORY.name, {"model": UPSCALER}) == 0
    counters = await gateway.counters()
    assert counters["darkroom_jobs_failed_total|tiny|out_of_memory"] == 1


async def test_a_worker_tells_what_it_serves_and_what_its_store_refused(
    gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec, settings: Settings
) -> None:
    worker = start_worker(fingerprint="f00d")
    store = worker.store
    assert store.folder is not None
    (store.folder / "outputs").write_text("no folder")
    spec = make_spec()
    await gateway.submit(spec)
    count = worker.metrics.registry.get_sample_value
    async for streamed in gateway.follow(spec.id):
        if streamed.event.type == "progress":
            break
    while not count(metrics.STORE_ERRORS.name, {"operation": "put"}):
        await gateway.ping()
    (store.folder / "outputs").unlink()
    record = await ended(gateway, spec)
    assert record.error is None
    assert Store(settings.store_url).errors == dict.fromkeys(store.errors, 0)
    for name in (BASE, UPSCALER):
        labels = {"model": name, "fingerprint": "f00d", "dtype": "float32", "device": "cpu"}
        assert count(metrics.WORKER_INFO.name, labels) == 1
    assert (count(metrics.PROCESS_MEMORY.name) or 0) > 50e6


def test_callers_cannot_make_a_series_of_every_size() -> None:
    shown = measures.WorkerMetrics()
    for width in [*range(8, 1008), 8]:
        shown.ticked(LaneTicked(LaneKey(BASE, 8, width, guided=True), rows=1, bucket=1, seconds=0.1))
    ticks = {
        sample.labels["lane"]: sample.value
        for family in shown.registry.collect()
        for sample in family.samples
        if sample.name == metrics.TICKS.name
    }
    assert len(ticks) == measures._MAX_LANES + 1
    assert ticks["8x8 guided"] == 2
    assert ticks["other"] == 1000 - measures._MAX_LANES
