"""Abandoned jobs go back to the head of their queue, and none is lost between two steps."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from broker.connection import REDIS_UNAVAILABLE, connect
from broker.embedded import EmbeddedValkey
from broker.gateway_side import JobBroker
from broker.reap import Swept
from broker.supervisor_side import SupervisorBroker
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys, metrics
from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import JobResult, JobSpec, JobStatus, Priority

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]
MakeWorker = Callable[..., WorkerBroker]
LEASE = 0.2


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[JobBroker]:
    """Swept once already, so that the lease of patience after its start is over."""
    broker = JobBroker(settings.model_copy(update={"lease_seconds": LEASE, "max_abandonments": 2}))
    await broker.sweep()
    await asyncio.sleep(LEASE)
    yield broker
    await broker.close()


@pytest.fixture
def mortal(make_worker: MakeWorker) -> WorkerBroker:
    return make_worker(lease_seconds=LEASE)


async def test_a_silent_worker_loses_its_job_to_another(
    gateway: JobBroker, mortal: WorkerBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    first, second = make_spec(), make_spec()
    await gateway.submit(first)
    (job,) = mortal.take(1)
    await gateway.submit(second)
    assert mortal.heartbeat([job]) == set()
    assert await gateway.sweep() == Swept()
    await asyncio.sleep(LEASE * 1.2)
    assert await gateway.sweep() == Swept(returned=1)
    assert await gateway.sweep() == Swept()
    again, _ = worker.take(2)
    assert again.job_id == first.id  # ahead of the younger job
    assert mortal.heartbeat([job]) == {first.id}
    assert not mortal.succeed(job, result_of(job))
    assert worker.succeed(again, result_of(again))
    record = await gateway.get(first.id)
    assert record is not None
    assert record.result == result_of(again)
    counters = await gateway.counters()
    assert counters[keys.counter(metrics.EXECUTIONS_REAPED.name, "tiny")] == 1


async def test_a_heartbeat_keeps_the_lease(gateway: JobBroker, mortal: WorkerBroker, make_spec: MakeSpec) -> None:
    await gateway.submit(make_spec())
    (job,) = mortal.take(1)
    for _ in range(6):
        await asyncio.sleep(LEASE / 3)
        assert mortal.heartbeat([job]) == set()
        assert await gateway.sweep() == Swept()


async def test_nobody_is_reaped_right_after_the_sweeper_starts(
    settings: Settings, gateway: JobBroker, mortal: WorkerBroker, make_spec: MakeSpec
) -> None:
    await gateway.submit(make_spec())
    mortal.take(1)
    await asyncio.sleep(LEASE * 1.2)
    late = JobBroker(settings.model_copy(update={"lease_seconds": LEASE}))
    assert await late.sweep() == Swept()
    await late.close()
    assert await gateway.sweep() == Swept(returned=1)


async def test_a_dead_workers_jobs_go_back_at_once(
    gateway: JobBroker, make_worker: MakeWorker, make_spec: MakeSpec, settings: Settings, redis_client: Redis
) -> None:
    specs = [make_spec() for _ in range(4)]
    for spec in specs:
        await gateway.submit(spec)
    dead, living = make_worker(), make_worker()
    lost = dead.take(3)
    (kept,) = living.take(1)
    supervisor = SupervisorBroker(settings)
    assert supervisor.reap_worker(dead.name) == Swept(returned=3)
    assert supervisor.reap_worker(dead.name) == Swept()
    supervisor.close()
    assert [worker.name for worker in await gateway.workers()] == [living.name]
    assert redis_client.smembers("rq:workers") == {f"rq:worker:{living.name}".encode()}
    assert living.heartbeat([kept]) == set()
    assert dead.heartbeat(lost) == {job.job_id for job in lost}
    assert {job.job_id for job in living.take(8)} == {spec.id for spec in specs[:3]}


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(data_dir=tmp_path / "valkey") as server:
        yield server


async def test_jobs_survive_a_restart_of_the_server(
    durable: EmbeddedValkey, settings: Settings, make_spec: MakeSpec
) -> None:
    broker = JobBroker(settings.model_copy(update={"redis_url": durable.url}))
    spec = make_spec()
    await broker.submit(spec)
    durable.stop()
    with connect(durable.start().url) as client:
        assert client.llen(f"rq:queue:{keys.queue_name('tiny', Priority.INTERACTIVE)}") == 1
    record = await broker.get(spec.id)
    assert record is not None
    assert record.spec == spec
    await broker.close()


async def test_a_worker_goes_on_after_a_restart_of_the_server(
    durable: EmbeddedValkey, settings: Settings, card: ModelCard, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    """Both sides keep their objects; the lease ran out meanwhile, and nobody took the job away."""
    changed = settings.model_copy(update={"redis_url": durable.url, "lease_seconds": LEASE})
    broker, worker = JobBroker(changed), WorkerBroker(changed, [card], slots=8)
    worker.register()
    assert worker.sweep() == Swept()
    specs = [make_spec(), make_spec()]
    for spec in specs:
        await broker.submit(spec)
    (job,) = worker.take(1)
    assert worker.save_resume(job, {0: b"state"}, 1)
    durable.stop()
    for call in (worker.sweep, lambda: worker.heartbeat([job]), lambda: worker.take(1)):
        with pytest.raises(REDIS_UNAVAILABLE):
            call()
    durable.start()
    assert worker.sweep() == Swept()  # reachable again, but not yet for a lease
    assert worker.heartbeat([job]) == set()
    await asyncio.sleep(LEASE / 2)
    assert worker.heartbeat([job]) == set()
    assert worker.hand_back(job)
    again, other = worker.take(8)
    assert again.resume == {0: b"state"}
    assert {again.job_id, other.job_id} == {spec.id for spec in specs}
    assert worker.succeed(other, result_of(other))
    worker.progress(again, 1, 4)
    await asyncio.sleep(LEASE * 1.2)
    assert await broker.sweep() == Swept()  # the gateway has just begun to look
    assert worker.sweep() == Swept(returned=1)
    for spec, status in zip(specs, (JobStatus.QUEUED, JobStatus.SUCCEEDED), strict=True):
        record = await broker.get(spec.id)
        assert record is not None
        assert record.status is status
    worker.close()
    await broker.close()


async def test_a_follower_learns_that_the_server_went_away(
    durable: EmbeddedValkey, settings: Settings, make_spec: MakeSpec
) -> None:
    broker = JobBroker(settings.model_copy(update={"redis_url": durable.url}))
    spec = make_spec()
    await broker.submit(spec)
    follower = asyncio.create_task(broker.wait(spec.id, 30))
    await asyncio.sleep(0.1)
    durable.stop()
    with pytest.raises(REDIS_UNAVAILABLE):
        await follower
    with pytest.raises(REDIS_UNAVAILABLE):
        await broker.submit(make_spec())
    durable.start()
    assert (await broker.submit(make_spec())).created  # nobody had to be restarted
    assert await broker.cancel(spec.id) is JobStatus.CANCELLED
    await broker.close()
