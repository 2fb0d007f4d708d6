"""What a change of primaries does to a gateway whose address for Redis is always the same."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest
from redis import Redis

from broker import reap
from broker.connection import redis_time
from broker.embedded import EmbeddedValkey, free_port
from broker.gateway_side import JobBroker
from broker.reap import Swept
from broker.worker_side import WorkerBroker
from contract.settings import Settings
from contract.spec import JobSpec

MakeSpec = Callable[..., JobSpec]
LEASE = 0.4


@pytest.fixture(scope="module")
def valkey_server() -> Iterator[EmbeddedValkey]:
    """Its own: its role changes."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"lease_seconds": LEASE})


def waiting_reader(client: Redis, gone: str = "") -> str:
    """Id of the hub's connection, once it waits for events."""
    for _ in range(500):
        waiting = [other["id"] for other in client.client_list() if other["cmd"] == "xread" and "b" in other["flags"]]
        if waiting and waiting[0] != gone:
            return str(waiting[0])
        time.sleep(0.01)
    raise AssertionError("nobody waits for events any more")


async def test_followers_outlast_a_demotion(
    gateway: JobBroker, worker: WorkerBroker, redis_client: Redis, make_spec: MakeSpec
) -> None:
    """A server that becomes a replica ends the hub's blocking read with an error of its own."""
    spec = make_spec()
    await gateway.submit(spec)
    async with aclosing(gateway.follow(spec.id)) as events:
        assert (await anext(events)).event.type == "queued"
        started = asyncio.ensure_future(anext(events))
        before = await asyncio.to_thread(waiting_reader, redis_client)
        redis_client.replicaof("127.0.0.1", str(free_port()))
        await asyncio.to_thread(waiting_reader, redis_client, before)
        redis_client.replicaof("no", "one")
        assert len(worker.take(1)) == 1
        assert (await started).event.type == "started"


async def test_leases_outlast_a_primary_whose_clock_is_ahead(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers get one lease to renew in the new time. Servers on one machine have one clock: only the sweep's is put
    forward here."""
    assert worker.sweep() == Swept()
    await asyncio.sleep(1.1 * LEASE)
    await gateway.submit(make_spec())
    worker.take(1)
    assert worker.sweep() == Swept()
    monkeypatch.setattr(reap, "redis_time", lambda connection: redis_time(connection) + 3600)
    assert worker.sweep() == Swept()
    assert worker.sweep() == Swept()
    await asyncio.sleep(1.1 * LEASE)
    assert worker.sweep() == Swept(returned=1)
