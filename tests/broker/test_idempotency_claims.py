"""A claim on an Idempotency-Key: one holder at a time, across gateways, and only as long as it is needed."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis import Redis

from broker.connection import connect_async
from broker.embedded import EmbeddedValkey
from broker.idempotency import CLAIM_SECONDS, Claims
from contract import keys


@pytest.fixture
async def two_gateways(redis_client: Redis, valkey_server: EmbeddedValkey) -> AsyncIterator[tuple[Claims, Claims]]:
    async with connect_async(valkey_server.url) as one, connect_async(valkey_server.url) as other:
        yield Claims(one), Claims(other)


async def test_one_of_many_gets_the_claim(two_gateways: tuple[Claims, Claims], redis_client: Redis) -> None:
    tokens = await asyncio.gather(*(two_gateways[i % 2].claim("ann", "key") for i in range(20)))
    (token,) = [token for token in tokens if token]
    assert 0 < redis_client.ttl(keys.idempotency_claim("ann", "key")) <= CLAIM_SECONDS  # a dead gateway's claim ends
    await two_gateways[1].release("ann", "key", "another's")
    assert await two_gateways[0].claim("ann", "key") is None
    await two_gateways[1].release("ann", "key", token)
    assert await two_gateways[0].claim("ann", "key")


async def test_claims_are_apart_by_api_key(two_gateways: tuple[Claims, Claims]) -> None:
    one, other = two_gateways
    assert await one.claim("ann", "key")
    assert await other.claim("bob", "key")
    assert await other.claim(None, "key")
    assert await other.claim("ann", "other key")
