"""Sentinel decides who is primary, and both sides of the broker follow: what was replicated goes on."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest

from broker.api_keys import Scope, create_key, revoke_key
from broker.connection import REDIS_UNAVAILABLE, connect, connect_async
from broker.embedded import free_port
from broker.events import START, StreamedEvent
from broker.gateway_side import JobBroker
from broker.reap import Swept
from broker.rq_surface import job_key
from broker.sentinel import Sentinels
from broker.supervisor_side import SupervisorBroker
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract.redis_url import parse_redis_url
from contract.settings import Settings
from contract.spec import JobResult, JobSpec, JobStatus
from tests.broker.sentinel_set import SentinelSet, patiently

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]
MakeWorker = Callable[..., WorkerBroker]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelSet]:
    with SentinelSet(tmp_path_factory.mktemp("sentinel")) as servers:
        yield servers


@pytest.fixture
def settings(settings: Settings, servers: SentinelSet) -> Settings:
    """Nobody sweeps here: the lease must outlast the test."""
    with servers.server(servers.primary()) as primary:
        primary.flushall()
    return settings.model_copy(update={"redis_url": servers.url, "lease_seconds": 60.0})


async def follow(gateway: JobBroker, job_id: str) -> list[StreamedEvent]:
    """As clients of event streams do: whoever is cut off comes again with the last id."""
    seen: list[StreamedEvent] = []

    async def on() -> None:
        async with aclosing(gateway.follow(job_id, seen[-1].id if seen else START)) as events:
            async for event in events:
                seen.append(event)  # noqa: PERF401 (what came before a cut counts)

    await patiently(on)
    return seen


def other(servers: SentinelSet, port: int) -> int:
    return next(one for one in servers.ports if one != port)


async def test_jobs_go_on_when_the_primary_dies(
    servers: SentinelSet, gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    running, waiting, later, last = (make_spec() for _ in range(4))
    await gateway.submit(running)
    await gateway.submit(waiting)
    (job,) = worker.take(1)
    follower = asyncio.create_task(follow(gateway, running.id))
    old, new = servers.primary(), other(servers, servers.primary())
    servers.replicate()
    servers.kill(old)

    assert (await patiently(lambda: gateway.submit(later))).created
    assert servers.primary() == new
    assert await patiently(lambda: asyncio.to_thread(worker.heartbeat, [job])) == set()
    assert worker.succeed(job, result_of(job))
    rest = worker.take(8)
    assert [job.job_id for job in rest] == [waiting.id, later.id]
    assert [worker.succeed(job, result_of(job)) for job in rest] == [True, True]
    assert [streamed.event.type for streamed in await follower] == ["queued", "started", "succeeded"]

    servers.start(old)
    servers.wait_for(old, lambda server: server.info("replication")["role"] == "slave")
    await gateway.submit(last)
    servers.wait_for(old, lambda server: bool(server.exists(job_key(last.id))))
    (job,) = worker.take(8)
    assert worker.succeed(job, result_of(job))


async def test_primary_and_replica_change_places(
    servers: SentinelSet, gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    """Both live on: connections to the old primary end, and the new one has never seen our scripts."""
    spec, second = make_spec(), make_spec()
    new = other(servers, servers.primary())
    await gateway.submit(spec)
    servers.replicate()
    with servers.server(new) as server:
        server.script_flush()
    servers.fail_over()
    assert servers.primary() == new
    await patiently(lambda: gateway.submit(second))
    jobs = await patiently(lambda: asyncio.to_thread(worker.take, 8))
    assert [job.job_id for job in jobs] == [spec.id, second.id]
    assert [worker.succeed(job, result_of(job)) for job in jobs] == [True, True]
    record = await gateway.get(second.id)
    assert record is not None
    assert record.status is JobStatus.SUCCEEDED


async def test_the_advised_rights_are_enough(
    gateway: JobBroker, worker: WorkerBroker, settings: Settings, make_spec: MakeSpec
) -> None:
    """For what no other test here does."""
    cancelled, stopped, back = (make_spec() for _ in range(3))
    await gateway.submit(cancelled, "once", "body")
    assert await gateway.cancel(cancelled.id) is JobStatus.CANCELLED
    assert await gateway.delete(cancelled.id) is JobStatus.CANCELLED
    await gateway.submit(stopped)
    await gateway.submit(back)
    first, second = worker.take(8)
    worker.progress(first, 1, 4)
    worker.preview(first, 0, 1, b"jpeg", "image/jpeg")
    assert await gateway.cancel(stopped.id) is JobStatus.RUNNING
    assert worker.end_stopped(first, worker.stops([first])[stopped.id])
    assert worker.save_resume(second, {0: b"state"}, 1)
    assert worker.hand_back(second)
    assert len((await gateway.list_jobs(None)).jobs) == 2
    assert [card.name for card in await gateway.cards()] == ["tiny"]
    assert [live.name for live in await gateway.workers()] == [worker.name]
    assert sum((await gateway.queue_depths()).values()) == 1
    assert max((await gateway.queue_ages()).values()) >= 0
    assert await gateway.running() == 0
    assert await gateway.counters()
    await gateway.url_signer()
    assert await gateway.sweep() == Swept()
    await gateway.clean()
    with connect(settings.redis_url) as client:
        key, _ = create_key(client, "painters", frozenset({Scope.SUBMIT}))
        assert revoke_key(client, key.id)
    supervisor = SupervisorBroker(settings)
    assert supervisor.reap_worker(worker.name) == Swept()
    supervisor.close()


async def test_a_connection_to_another_than_the_primary_is_not_used_again(servers: SentinelSet) -> None:
    elsewhere = ("127.0.0.1", free_port())
    with connect(servers.url) as client:
        before = client.client_id()
        assert client.client_id() == before
        client.connection_pool.connection_kwargs["sentinels"].primary = elsewhere
        assert client.client_id() != before
    async with connect_async(servers.url) as asynchronous:
        before = await asynchronous.client_id()
        assert await asynchronous.client_id() == before
        asynchronous.connection_pool.connection_kwargs["sentinels"].primary = elsewhere
        assert await asynchronous.client_id() != before


def test_what_keeps_sentinels_from_telling_is_said(servers: SentinelSet) -> None:
    for url, says in (
        (f"redis+sentinel://127.0.0.1:{free_port()}/darkroom", "Connection refused"),
        (servers.url.replace("/darkroom/", "/another/"), "watches no such service"),
        (servers.url.partition("?")[0], "Authentication required"),
    ):
        parsed = parse_redis_url(url)
        assert parsed is not None
        with pytest.raises(REDIS_UNAVAILABLE, match=f"no Sentinel knows where .*{says}"):
            Sentinels(parsed).find()


async def test_without_a_sentinel_redis_is_away() -> None:
    url = f"redis+sentinel://127.0.0.1:{free_port()}/darkroom"
    with connect(url) as client, pytest.raises(REDIS_UNAVAILABLE, match="no Sentinel knows"):
        client.ping()
    async with connect_async(url) as asynchronous:
        with pytest.raises(REDIS_UNAVAILABLE, match="no Sentinel knows"):
            await asynchronous.ping()
