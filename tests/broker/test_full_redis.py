"""A Redis that is full, or takes no writes for another reason: no job is lost, and what begins waits or is refused."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from broker.connection import REDIS_UNAVAILABLE
from broker.embedded import EmbeddedValkey
from broker.gateway_side import JobBroker
from broker.reap import Swept
from broker.refusals import AsyncRefusalParser, RefusalParser, WritesRefusedError
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.errors import ErrorCode
from contract.events import ProgressEvent
from contract.settings import Settings
from contract.spec import JobError, JobResult, JobSpec, JobStatus

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]
LEASE = 0.4


@pytest.fixture
def valkey_server() -> Iterator[EmbeddedValkey]:
    """Its own: each test fills it."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"lease_seconds": LEASE})


def fill(client: Redis) -> None:
    client.config_set("maxmemory", 1)


async def status_of(gateway: JobBroker, job_id: str) -> JobStatus | None:
    record = await gateway.get(job_id)
    return None if record is None else record.status


async def test_a_full_redis_takes_no_jobs_and_ends_those_it_has(
    gateway: JobBroker, worker: WorkerBroker, redis_client: Redis, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    specs = [make_spec() for _ in range(6)]
    for spec in specs:
        await gateway.submit(spec)
    done, failed, back, stopped = worker.take(4)
    fill(redis_client)
    with pytest.raises(WritesRefusedError):
        await gateway.submit(make_spec(id="too-many"))
    assert await gateway.get("too-many") is None
    with pytest.raises(WritesRefusedError):
        worker.save_resume(back, {0: b"state"}, 1)
    worker.progress(done, 3, 4)
    assert worker.succeed(done, result_of(done))
    assert worker.fail(failed, JobError(code=ErrorCode.INTERNAL, detail="on purpose"))
    assert worker.hand_back(back)
    assert await gateway.cancel(stopped.job_id) is JobStatus.RUNNING
    assert worker.end_stopped(stopped, worker.stops([stopped])[stopped.job_id])
    assert await gateway.cancel(specs[5].id) is JobStatus.CANCELLED
    again, last = worker.take(2)
    assert (again.job_id, last.job_id) == (back.job_id, specs[4].id)
    assert worker.succeed(again, result_of(again))
    assert not worker.succeed(back, result_of(back))  # fenced off, and counted some other time
    assert worker.succeed(last, result_of(last))
    ended = [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.SUCCEEDED]
    assert [await status_of(gateway, spec.id) for spec in specs] == [*ended, JobStatus.CANCELLED]
    assert redis_client.zcard(keys.leases()) == redis_client.zcard(keys.deadlines()) == 0


async def test_no_lease_ends_because_redis_is_full(
    gateway: JobBroker, worker: WorkerBroker, redis_client: Redis, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    assert worker.sweep() == Swept()
    (job,) = worker.take(1)
    fill(redis_client)
    for _ in range(8):
        assert worker.heartbeat([job]) == set()
        assert worker.sweep() == Swept()
        await asyncio.sleep(LEASE / 4)
    assert [live.running for live in await gateway.workers()] == [1]
    assert worker.succeed(job, result_of(job))


async def test_what_a_dead_worker_held_goes_on_in_a_full_redis(
    gateway: JobBroker, worker: WorkerBroker, redis_client: Redis, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    await gateway.submit(make_spec())
    assert worker.sweep() == Swept()
    worker.take(1)
    fill(redis_client)
    await asyncio.sleep(1.1 * LEASE)
    assert worker.sweep() == Swept(returned=1)
    (job,) = worker.take(1)
    assert worker.succeed(job, result_of(job))


async def test_a_worker_may_drain_for_a_suspect_in_a_full_redis(
    gateway: JobBroker, worker: WorkerBroker, redis_client: Redis, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    await gateway.submit(make_spec())
    (job,) = worker.take(1)
    suspect = make_spec()
    await gateway.submit(suspect)
    redis_client.lpush(keys.suspects(keys.queue_name(suspect.model, suspect.priority)), suspect.id)
    fill(redis_client)
    assert worker.take(1) == []
    assert worker.succeed(job, result_of(job))
    assert [taken.job_id for taken in worker.take(1)] == [suspect.id]


async def test_a_worker_may_start_and_a_janitor_cleans_in_a_full_redis(
    gateway: JobBroker,
    make_worker: Callable[[], WorkerBroker],
    redis_client: Redis,
    make_spec: MakeSpec,
    result_of: ResultOf,
) -> None:
    worker = make_worker()
    spec = make_spec()
    await gateway.submit(spec)
    (job,) = worker.take(1)
    assert worker.succeed(job, result_of(job))
    redis_client.zincrby(keys.ended(), -30 * 86400, spec.id)
    await gateway.url_signer()
    fill(redis_client)
    another = make_worker()
    another.heartbeat([])
    assert {live.name for live in await gateway.workers()} == {worker.name, another.name}
    assert (await gateway.clean()).jobs == 1
    assert await gateway.get(spec.id) is None
    redis_client.config_set("maxmemory", 0)
    another.heartbeat([])
    assert redis_client.sismember("rq:workers", f"rq:worker:{another.name}")


async def test_many_follow_in_a_full_redis(
    gateway: JobBroker, worker: WorkerBroker, redis_client: Redis, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    for spec in (specs := [make_spec(), make_spec()]):
        await gateway.submit(spec)
    jobs = worker.take(2)
    fill(redis_client)
    waiting = [asyncio.create_task(gateway.wait(specs[0].id, 30))]
    await asyncio.sleep(0.1)
    waiting.append(asyncio.create_task(gateway.wait(specs[1].id, 30)))  # wakes the reader
    worker.progress(jobs[1], 1, 4)
    for job in jobs:
        assert worker.succeed(job, result_of(job))
    assert [record and record.status for record in await asyncio.gather(*waiting)] == [JobStatus.SUCCEEDED] * 2
    past = [entry.event async for entry in gateway.follow(specs[1].id)]
    assert ProgressEvent(step=1, steps=4) in past


@pytest.mark.parametrize(
    ("setting", "says"),
    [({"min-replicas-to-write": 1}, "NOREPLICAS"), ({"replicaof": "127.0.0.1 1"}, "READONLY|MASTERDOWN")],
)
async def test_a_redis_without_writes_counts_as_away(
    gateway: JobBroker,
    worker: WorkerBroker,
    redis_client: Redis,
    make_spec: MakeSpec,
    result_of: ResultOf,
    setting: dict[str, str | int],
    says: str,
) -> None:
    """As with a primary cut off from its replicas, one that has become a replica, or one whose disk is full."""
    first, second = make_spec(), make_spec()
    for spec in (first, second):
        await gateway.submit(spec)
    await gateway.url_signer()
    assert worker.sweep() == Swept()
    (job,) = worker.take(1)
    change(redis_client, setting)
    for call in (lambda: worker.heartbeat([job]), lambda: worker.take(1), lambda: worker.succeed(job, result_of(job))):
        with pytest.raises(REDIS_UNAVAILABLE, match=says):
            call()
    with pytest.raises(REDIS_UNAVAILABLE, match=says):
        await gateway.submit(make_spec())
    await asyncio.sleep(1.1 * LEASE)
    with pytest.raises(REDIS_UNAVAILABLE, match=says):
        worker.sweep()
    assert [await status_of(gateway, spec.id) for spec in (first, second)] == [JobStatus.RUNNING, JobStatus.QUEUED]
    assert await gateway.workers() == []
    change(redis_client, dict.fromkeys(setting, "no one" if "replicaof" in setting else 0))
    assert worker.sweep() == Swept()  # the workers come first
    assert worker.heartbeat([job]) == set()
    assert worker.succeed(job, result_of(job))


def change(client: Redis, setting: dict[str, str | int]) -> None:
    for name, value in setting.items():
        if name == "replicaof":
            client.replicaof(*str(value).split())
        else:
            client.config_set(name, value)


@pytest.mark.parametrize("parser", [RefusalParser, AsyncRefusalParser])
def test_refusals_are_known_by_their_text(parser: type[RefusalParser]) -> None:
    """Redis 6.2 packs what a script met into an error of its own."""
    old = "ERR Error running script (call to f_1): @user_script:5: @user_script: 5: -%s"
    reason = "MISCONF Errors writing to the AOF file: No space left on device"
    for text in (reason, old % reason, old % "OOM command not allowed when used memory > 'maxmemory'."):
        assert isinstance(parser.parse_error(text), WritesRefusedError)
        assert isinstance(parser.parse_error(text), REDIS_UNAVAILABLE)
    for text in ("ERR wrong: OOM", "WRONGTYPE Operation against a key", "LOADING the dataset", "NOSCRIPT No matching"):
        assert not isinstance(parser.parse_error(text), WritesRefusedError)
