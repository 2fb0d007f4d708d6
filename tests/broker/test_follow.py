"""Event streams: replay, live, many followers over one connection."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import pytest
from redis import Redis

from broker.events import StreamedEvent
from broker.gateway_side import JobBroker
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.settings import Settings
from contract.spec import JobResult, JobSpec, JobStatus

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]


async def collect(gateway: JobBroker, job_id: str, after: str = "0-0") -> list[StreamedEvent]:
    async with aclosing(gateway.follow(job_id, after)) as events:
        return [streamed async for streamed in events]


async def test_many_followers_see_the_same_events_live(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, redis_client: Redis
) -> None:
    specs = [make_spec() for _ in range(4)]
    for spec in specs:
        await gateway.submit(spec)
    followers = [asyncio.create_task(collect(gateway, spec.id)) for spec in specs for _ in range(25)]
    await asyncio.sleep(0.1)
    assert gateway.followers == 100
    before = len(redis_client.client_list())
    jobs = await asyncio.to_thread(worker.take, 8)
    for step in range(1, 5):
        for job in jobs:
            await asyncio.to_thread(worker.progress, job, step, 4)
        await asyncio.sleep(0.12)
    assert len(redis_client.client_list()) <= before + 1
    for job in jobs:
        await asyncio.to_thread(worker.succeed, job, result_of(job))
    async with asyncio.timeout(5):
        seen = await asyncio.gather(*followers)
    expected = ["queued", "started", "progress", "progress", "progress", "progress", "succeeded"]
    assert all([streamed.event.type for streamed in events] == expected for events in seen)
    assert all(events == sorted(events, key=lambda item: item.at) for events in seen)
    assert gateway.followers == 0


async def test_a_late_follower_of_a_followed_job_misses_nothing(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    spec, other = make_spec(), make_spec()
    await gateway.submit(spec)
    await gateway.submit(other)
    early = asyncio.create_task(collect(gateway, spec.id))
    await asyncio.sleep(0.05)
    job, _ = await asyncio.to_thread(worker.take, 2)
    await asyncio.sleep(0.05)
    late = asyncio.create_task(collect(gateway, spec.id))
    busy_elsewhere = asyncio.create_task(collect(gateway, other.id))  # wakes the blocked reader
    await asyncio.sleep(0.05)
    await asyncio.to_thread(worker.succeed, job, result_of(job))
    async with asyncio.timeout(3):
        assert await early == await late
    await gateway.cancel(other.id)
    busy_elsewhere.cancel()
    with pytest.raises(asyncio.CancelledError):
        await busy_elsewhere
    assert gateway.followers == 0


async def test_replay_from_an_id(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, settings: Settings
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    (job,) = worker.take(1)
    worker.succeed(job, result_of(job))
    queued, started, succeeded = await collect(gateway, spec.id)
    assert await collect(gateway, spec.id, queued.id) == [started, succeeded]
    assert await collect(gateway, spec.id, succeeded.id) == []
    with pytest.raises(ValueError, match="invalid literal"):
        await collect(gateway, spec.id, "yesterday")


async def test_an_ended_job_without_events_ends_the_stream(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, redis_client: Redis
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    (job,) = worker.take(1)
    worker.succeed(job, result_of(job))
    assert 0 < redis_client.ttl(keys.events(spec.id)) <= 3600
    redis_client.delete(keys.events(spec.id))
    worker.progress(job, 4, 4)  # too late; must not bring the stream back
    assert not redis_client.exists(keys.events(spec.id))
    async with asyncio.timeout(3):
        assert await collect(gateway, spec.id) == []
        assert await collect(gateway, "unknown") == []


async def test_the_stream_is_bounded(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, redis_client: Redis
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    (job,) = worker.take(1)
    for step in range(400):
        worker.preview(job, 0, step, b"x", "image/jpeg")
    assert redis_client.xlen(keys.events(spec.id)) == 256


async def test_progress_is_throttled(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, redis_client: Redis
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    (job,) = worker.take(1)
    for step in range(1, 51):
        worker.progress(job, step, 50)
    assert redis_client.get(keys.progress(spec.id)) == b"50/50/50"
    assert redis_client.xlen(keys.events(spec.id)) <= 2 + 5


async def test_wait_returns_at_the_end_or_when_time_is_up(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    record = await gateway.wait(spec.id, 0.05)
    assert record is not None
    assert record.status is JobStatus.QUEUED
    waiting = asyncio.create_task(gateway.wait(spec.id, 10))
    await asyncio.sleep(0.05)
    (job,) = worker.take(1)
    worker.succeed(job, result_of(job))
    async with asyncio.timeout(2):
        ended = await waiting
    assert ended is not None
    assert ended.status is JobStatus.SUCCEEDED
