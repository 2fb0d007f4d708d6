"""Calls that share a round trip stay calls of their own."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ResponseError

from broker.connection import REDIS_UNAVAILABLE, connect_async
from broker.embedded import EmbeddedValkey
from broker.gathered import GatheredScript

_ADD = "if ARGV[1] == 'bad' then return redis.error_reply('no') end return redis.call('INCRBY', KEYS[1], ARGV[1])"


@pytest.fixture
async def connection(redis_client: Redis, valkey_server: EmbeddedValkey) -> AsyncIterator[AsyncRedis]:
    async with connect_async(valkey_server.url) as client:
        yield client


async def test_each_caller_gets_its_own_answer_in_order(connection: AsyncRedis) -> None:
    add = GatheredScript(connection, _ADD)
    assert await asyncio.gather(*(add(["sum"], [1]) for _ in range(300))) == list(range(1, 301))


async def test_calls_of_one_turn_share_pipelines(connection: AsyncRedis, redis_client: Redis) -> None:
    add = GatheredScript(connection, _ADD)
    await add(["sum"], [0])
    before = redis_client.info("clients")["connected_clients"]
    await asyncio.gather(*(add(["sum"], [1]) for _ in range(100)))
    assert redis_client.info("clients")["connected_clients"] == before  # one at a time would have opened up to 64
    assert redis_client.get("sum") == b"100"


async def test_a_failure_is_its_callers_alone(connection: AsyncRedis) -> None:
    add = GatheredScript(connection, _ADD)
    calls = (add(["sum"], [1]), add(["sum"], ["bad"]), add(["sum"], [1]))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert (answers[0], answers[2]) == (1, 2)
    assert isinstance(answers[1], ResponseError)


async def test_a_caller_that_leaves_takes_nobody_along(connection: AsyncRedis) -> None:
    add = GatheredScript(connection, _ADD)
    calls = [asyncio.create_task(add(["sum"], [1])) for _ in range(3)]
    await asyncio.sleep(0)
    calls[1].cancel()
    first, left, last = await asyncio.gather(*calls, return_exceptions=True)
    assert (first, last) == (1, 3)  # the call had been made
    assert isinstance(left, asyncio.CancelledError)


async def test_a_redis_that_forgot_the_script_learns_it_again(connection: AsyncRedis, redis_client: Redis) -> None:
    add = GatheredScript(connection, _ADD)
    await add(["sum"], [1])
    redis_client.script_flush()
    assert await asyncio.gather(*(add(["sum"], [1]) for _ in range(3))) == [2, 3, 4]


async def test_everybody_hears_that_redis_is_away() -> None:
    server = EmbeddedValkey()
    server.start()
    async with connect_async(server.url) as connection:
        add = GatheredScript(connection, _ADD)
        await add(["sum"], [1])
        server.stop()
        answers = await asyncio.gather(*(add(["sum"], [1]) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(answer, REDIS_UNAVAILABLE) for answer in answers)
