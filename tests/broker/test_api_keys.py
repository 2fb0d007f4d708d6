"""API keys in a real Redis: what is stored, what is recognised, who may have how many jobs, and what is left."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Callable

import pytest
from pydantic import ValidationError
from redis import Redis

from broker.api_keys import (
    ApiKey,
    Scope,
    create_key,
    is_damaged,
    key_id,
    list_keys,
    new_secret,
    read_table,
    revoke_key,
)
from broker.connection import REDIS_UNAVAILABLE, connect, connect_async
from broker.embedded import EmbeddedValkey
from broker.gateway_side import JobBroker
from broker.janitor import delete_job
from broker.key_ring import CACHE_SECONDS, KeyRing
from broker.limits import SubmitRefusedError
from broker.quotas import OwnLimits, Quota
from broker.stops import Stop
from broker.submit import Submitted
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobResult, JobSpec
from tests.relay import TcpRelay

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]
SUBMIT_AND_READ = (Scope.SUBMIT, Scope.READ)


@pytest.fixture
async def gateways(settings: Settings) -> AsyncIterator[tuple[JobBroker, JobBroker]]:
    pair = JobBroker(settings), JobBroker(settings)
    yield pair
    for gateway in pair:
        await gateway.close()


def test_a_secret_is_one_word_with_a_checksum() -> None:
    secrets = {new_secret() for _ in range(200)}
    assert len(secrets) == 200
    for secret in secrets:
        assert re.fullmatch(r"dk_[0-9A-Za-z]{49}", secret)
        assert not is_damaged(secret)


@pytest.mark.parametrize(
    "damage",
    [
        lambda key: key[:-1],
        lambda key: key + "0",
        lambda key: key[:20] + key[21:],
        lambda key: key[:20] + ("a" if key[20] != "a" else "b") + key[21:],
        lambda key: key[:-1] + "\udcff",
        lambda key: key[:3],
    ],
)
def test_what_got_lost_on_the_way_is_told(damage: Callable[[str], str]) -> None:
    assert is_damaged(damage(new_secret()))
    assert not is_damaged("a key from the settings")


def test_redis_never_holds_a_secret(redis_client: Redis) -> None:
    key, secret = create_key(redis_client, "team", SUBMIT_AND_READ)
    assert key.id == key_id(secret)
    assert key.fits(secret)
    assert not key.fits(new_secret())
    everything = redis_client.hgetall(keys.api_keys())
    assert secret[3:] not in str(everything)
    assert key.sha256 in str(everything)
    assert key.sha256 not in repr(key)


def test_the_list_names_revoked_keys_too(redis_client: Redis) -> None:
    first, _ = create_key(redis_client, "first", (Scope.READ,))
    second, _ = create_key(redis_client, "second", (Scope.ADMIN,), OwnLimits(rate_per_second=2.0, max_running=1))
    assert list_keys(redis_client) == [first, second]
    assert second.scopes == set(Scope)  # admin holds the others
    revoked = revoke_key(redis_client, first.id)
    assert revoked is not None
    assert revoked.revoked_at is not None
    assert revoke_key(redis_client, first.id) == revoked  # once is once
    assert revoke_key(redis_client, "no-such-id") is None
    assert list_keys(redis_client) == [revoked, second]


@pytest.mark.parametrize(
    ("name", "scopes"), [("", SUBMIT_AND_READ), ("a\nb", SUBMIT_AND_READ), ("x" * 101, SUBMIT_AND_READ), ("team", ())]
)
def test_a_key_that_makes_no_sense_is_not_made(redis_client: Redis, name: str, scopes: tuple[Scope, ...]) -> None:
    with pytest.raises(ValidationError):
        create_key(redis_client, name, scopes)
    assert not redis_client.exists(keys.api_keys())


@pytest.fixture
async def ring(settings: Settings) -> AsyncIterator[KeyRing]:
    connection = connect_async(settings.redis_url)
    yield KeyRing(connection, settings)
    await connection.aclose()


async def test_the_keys_are_read_again_only_after_a_change(settings: Settings, redis_client: Redis) -> None:
    connection = connect_async(settings.redis_url)
    empty = await read_table(connection, None)
    assert await read_table(connection, empty) is empty
    assert not empty.keys
    assert empty.version == ""
    key, secret = create_key(redis_client, "team", SUBMIT_AND_READ)
    table = await read_table(connection, empty)
    assert table.find(secret) == key
    assert await read_table(connection, table) is table
    revoke_key(redis_client, key.id)
    after = await read_table(connection, table)
    assert after.find(secret) is None
    assert after.version  # a key was made once
    await connection.aclose()


async def test_a_key_of_the_future_is_none_and_harms_no_other(ring: KeyRing, redis_client: Redis) -> None:
    """A gateway must not fall over what a newer `darkroom keys` wrote."""
    key, secret = create_key(redis_client, "team", SUBMIT_AND_READ)
    future, other = create_key(redis_client, "future", SUBMIT_AND_READ)
    redis_client.hset(keys.api_keys(), future.id, future.model_dump_json().replace("submit", "levitate"))
    table = await ring.table()
    assert (table.find(secret), table.find(other)) == (key, None)


async def test_redis_is_asked_once_in_a_while_however_many_ask(ring: KeyRing, redis_client: Redis) -> None:
    create_key(redis_client, "team", SUBMIT_AND_READ)
    redis_client.config_resetstat()
    begun = time.monotonic()
    tables = [await ring.table() for _ in range(100)] + await asyncio.gather(*(ring.table() for _ in range(100)))
    may_ask = 1 + (time.monotonic() - begun) / CACHE_SECONDS
    assert all(table is tables[0] for table in tables)
    statistics: dict[str, dict[str, int]] = redis_client.info("commandstats")
    assert statistics["cmdstat_hgetall"]["calls"] == 1
    assert statistics["cmdstat_get"]["calls"] <= 2 * may_ask


async def test_a_slow_redis_answers_for_all_who_wait(ring: KeyRing, redis_client: Redis) -> None:
    """Else each would ask again behind the other, since an answer that took so long is old when it comes."""
    create_key(redis_client, "team", SUBMIT_AND_READ)
    redis_client.config_resetstat()
    redis_client.client_pause(int(1300 * CACHE_SECONDS))
    tables = await asyncio.gather(*(ring.table() for _ in range(20)))
    assert all(table is tables[0] for table in tables)
    statistics: dict[str, dict[str, int]] = redis_client.info("commandstats")
    assert statistics["cmdstat_get"]["calls"] == 2  # the version, then once more beside the keys


class Silent(TcpRelay):
    """Takes requests and never answers."""

    def directions(self, client: socket.socket, server: socket.socket) -> tuple[Callable[[], None], Callable[[], None]]:
        del client, server
        return (lambda: None), (lambda: None)


async def test_a_silent_redis_is_found_out_once_for_all_who_wait(
    settings: Settings, valkey_server: EmbeddedValkey
) -> None:
    """Where no key is known yet: one after the other they would wait for minutes."""
    with Silent(valkey_server.url, 6379) as relay:
        connection = connect_async(f"redis://127.0.0.1:{relay.port}/0")
        ring = KeyRing(connection, settings)
        answers = await asyncio.gather(*(ring.table() for _ in range(20)), return_exceptions=True)
        await connection.aclose()
    assert all(isinstance(answer, REDIS_UNAVAILABLE) for answer in answers)
    assert relay.connections == 1


async def test_changes_are_known_when_the_cache_is_old(ring: KeyRing, redis_client: Redis) -> None:
    assert not (await ring.table()).keys
    key, secret = create_key(redis_client, "team", SUBMIT_AND_READ)
    await asyncio.sleep(CACHE_SECONDS)
    assert (await ring.table()).find(secret) == key
    revoke_key(redis_client, key.id)
    await asyncio.sleep(CACHE_SECONDS)
    assert (await ring.table()).find(secret) is None


async def test_known_keys_stay_known_while_redis_is_away(settings: Settings) -> None:
    server = EmbeddedValkey()
    server.start()
    away = settings.model_copy(update={"redis_url": server.url})
    with connect(server.url) as client:
        key, secret = create_key(client, "team", SUBMIT_AND_READ)
    first, second = (connect_async(server.url) for _ in range(2))
    knows, knows_not = KeyRing(first, away), KeyRing(second, away)
    await knows.table()
    server.stop()
    with pytest.raises(REDIS_UNAVAILABLE):
        await knows_not.table()
    await asyncio.sleep(CACHE_SECONDS)
    assert [(await knows.table()).find(secret) for _ in range(3)] == [key] * 3
    await first.aclose()
    await second.aclose()


def test_keys_may_be_revoked_by_several_at_once(redis_client: Redis) -> None:
    """A change between the reading and the writing of another is not undone."""
    made: list[ApiKey] = [create_key(redis_client, f"team {i}", SUBMIT_AND_READ)[0] for i in range(8)]

    async def revoke_all() -> None:
        await asyncio.gather(*(asyncio.to_thread(revoke_key, redis_client, key.id) for key in made))

    asyncio.run(revoke_all())
    assert all(key.revoked_at is not None for key in list_keys(redis_client))


def with_limits(redis_client: Redis, **own: float) -> str:
    """The id of a new key."""
    return create_key(redis_client, "team", SUBMIT_AND_READ, OwnLimits.model_validate(own))[0].id


def quota(answer: Submitted | SubmitRefusedError) -> Quota:
    assert answer.quota is not None
    return answer.quota


async def test_two_gateways_share_one_bucket_exactly(
    gateways: tuple[JobBroker, JobBroker], make_spec: MakeSpec, redis_client: Redis
) -> None:
    """120 submits through both at once, of which a bucket of 30 lets 30 pass; another key's bucket is full."""
    a, b = (with_limits(redis_client, rate_per_second=0.001, rate_burst=30) for _ in range(2))
    answers = await asyncio.gather(
        *(gateways[i % 2].submit(make_spec(api_key_id=a)) for i in range(120)), return_exceptions=True
    )
    accepted = [answer for answer in answers if isinstance(answer, Submitted)]
    refused = [answer for answer in answers if isinstance(answer, SubmitRefusedError)]
    assert (len(accepted), len(refused)) == (30, 90)
    assert sorted(int(quota(answer).tokens) for answer in accepted) == list(range(30))
    assert {answer.code for answer in refused} == {ErrorCode.RATE_LIMITED}
    assert all(0 < (answer.retry_after or 0) <= 1000 and quota(answer).tokens < 1 for answer in refused)
    assert (await gateways[0].submit(make_spec(api_key_id=b))).created


async def test_a_bucket_of_years_is_no_error(settings: Settings, make_spec: MakeSpec) -> None:
    gateway = JobBroker(settings.model_copy(update={"rate_per_second": 1e-30}))
    assert (await gateway.submit(make_spec())).created
    await gateway.close()


async def test_a_repeated_request_costs_nothing(
    gateways: tuple[JobBroker, JobBroker], make_spec: MakeSpec, redis_client: Redis
) -> None:
    a = with_limits(redis_client, rate_per_second=0.001, rate_burst=1)
    first = await gateways[0].submit(make_spec(api_key_id=a), "key", "body")
    again = await gateways[1].submit(make_spec(api_key_id=a), "key", "body")
    assert (again.job_id, again.created, int(quota(again).tokens)) == (first.job_id, False, 0)


async def test_a_key_has_its_own_cap_on_unfinished_jobs(
    gateways: tuple[JobBroker, JobBroker], make_spec: MakeSpec, redis_client: Redis
) -> None:
    a = with_limits(redis_client, max_waiting=2)
    assert [quota(await gateways[0].submit(make_spec(api_key_id=a))).unfinished for _ in range(2)] == [1, 2]
    with pytest.raises(SubmitRefusedError, match="your unfinished jobs for tiny have reached the limit of 2") as full:
        await gateways[1].submit(make_spec(api_key_id=a))
    assert (full.value.code, quota(full.value).unfinished) == (ErrorCode.QUEUE_FULL, 2)
    await gateways[0].submit(make_spec(api_key_id="b"))  # the settings' cap


async def test_no_more_jobs_of_a_key_run_than_may(
    gateways: tuple[JobBroker, JobBroker],
    worker: WorkerBroker,
    make_worker: Callable[..., WorkerBroker],
    make_spec: MakeSpec,
    result_of: ResultOf,
    redis_client: Redis,
) -> None:
    """In all workers together; the others wait, the next key is served, and an end makes room."""
    gateway, other = gateways[0], make_worker()
    a = with_limits(redis_client, max_running=2)
    for _ in range(5):
        await gateway.submit(make_spec(api_key_id=a))
    (first,) = worker.take(1)
    (second,) = other.take(8)
    assert {first.spec.api_key_id, second.spec.api_key_id} == {a}
    assert worker.take(8) == []
    late = make_spec(api_key_id="b")
    await gateway.submit(late)
    assert [job.job_id for job in worker.take(8)] == [late.id]
    assert worker.succeed(first, result_of(first))
    (third,) = other.take(8)
    assert third.spec.api_key_id == a
    assert worker.take(8) == []
    assert other.hand_back(second)  # what had begun goes on first, and counts again
    assert [job.job_id for job in worker.take(8)] == [second.job_id]
    assert worker.take(8) == []


async def test_a_lifted_cap_lets_the_waiting_jobs_go(
    settings: Settings, worker: WorkerBroker, make_spec: MakeSpec
) -> None:
    """The last submit tells which cap holds."""
    capped, lifted = JobBroker(settings.model_copy(update={"max_running_per_key": 1})), JobBroker(settings)
    for _ in range(3):
        await capped.submit(make_spec(api_key_id="a"))
    assert len(worker.take(8)) == 1
    assert len(worker.take(8)) == 0
    await lifted.submit(make_spec(api_key_id="a"))
    assert len(worker.take(8)) == 3
    for gateway in (capped, lifted):
        await gateway.close()


async def test_a_cancelled_job_makes_room_too(
    gateways: tuple[JobBroker, JobBroker], worker: WorkerBroker, make_spec: MakeSpec, redis_client: Redis
) -> None:
    a = with_limits(redis_client, max_running=1)
    for _ in range(3):
        await gateways[0].submit(make_spec(api_key_id=a))
    (running,) = worker.take(8)
    await gateways[0].cancel(running.job_id)
    assert worker.end_stopped(running, Stop.CANCELLED)
    assert len(worker.take(8)) == 1


async def test_all_jobs_are_listed_once(
    gateways: tuple[JobBroker, JobBroker],
    worker: WorkerBroker,
    make_spec: MakeSpec,
    result_of: ResultOf,
    redis_client: Redis,
) -> None:
    gateway = gateways[0]
    specs = [make_spec(api_key_id=owner) for owner in ("a", None, "b", "a")]
    for spec in specs:
        await gateway.submit(spec)
    listed, cursor = [], None
    while True:
        page = await gateway.list_all_jobs(limit=3, cursor=cursor)
        listed += [job.spec.id for job in page.jobs]
        cursor = page.cursor
        if cursor is None:
            break
    assert listed == [spec.id for spec in reversed(specs)]
    for job in worker.take(8):
        worker.succeed(job, result_of(job))
    for spec in specs:
        delete_job(redis_client, gateway.store, spec.id)
    assert not redis_client.exists(keys.all_jobs())
