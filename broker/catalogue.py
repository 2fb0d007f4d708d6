"""The models that exist (persistent) and the workers that live (heartbeats): two different things.

A known model without a live worker still takes jobs, so that workers can be started on demand.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

from pydantic import Field, ValidationError
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from broker import rq_surface
from broker.connection import text
from broker.refusals import LUA_EVEN_IF_FULL
from contract import keys
from contract.card import ModelCard
from contract.spec import Document, Name

Written = TypeVar("Written", bound=Document)

# KEYS: workers, worker; ARGV: name, seconds, document. Forgets the workers that have fallen silent.
_BEAT: Final = (
    LUA_EVEN_IF_FULL
    + """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], string.format('%.3f', now + tonumber(ARGV[2])), ARGV[1])
redis.call('SET', KEYS[2], ARGV[3], 'EX', math.ceil(tonumber(ARGV[2])))
"""
)


class LiveWorker(Document):
    """One worker's latest heartbeat: models served, rows it can hold, jobs it holds now. Workers of equal
    `fingerprint` make equal pictures of equal requests."""

    name: str
    models: tuple[Name, ...]
    slots: int = Field(ge=0)
    running: int = Field(ge=0)
    fingerprint: str = ""


def publish_cards(connection: Redis, cards: Sequence[ModelCard]) -> None:
    """Adds the models or replaces their cards."""
    if cards:
        connection.hset(keys.cards(), mapping={card.name: card.model_dump_json() for card in cards})


def beat(connection: Redis, worker: LiveWorker, lease_seconds: float) -> None:
    arguments = [worker.name, str(lease_seconds), worker.model_dump_json()]
    connection.eval(_BEAT, 2, keys.workers(), keys.worker(worker.name), *arguments)


def remove_worker(connection: Redis, name: str) -> None:
    """Off our lists and RQ's, at once."""
    pipeline = connection.pipeline(transaction=False)
    pipeline.zrem(keys.workers(), name)
    pipeline.delete(keys.worker(name))
    rq_surface.forget_worker(name, pipeline)
    pipeline.execute()


async def read_cards(connection: AsyncRedis) -> list[ModelCard]:
    """All known models by name."""
    cards = await connection.hgetall(keys.cards())
    return _readable(ModelCard, (cards[name] for name in sorted(cards, key=text)))


async def read_workers(connection: AsyncRedis) -> list[LiveWorker]:
    """Workers whose last heartbeat is younger than a lease."""
    seconds, microseconds = await connection.time()
    living: Any = await connection.zrangebyscore(keys.workers(), seconds + microseconds / 1e6, "+inf")
    names = [text(name) for name in living]
    documents = await connection.mget([keys.worker(name) for name in names]) if names else []
    return _readable(LiveWorker, documents)


def _readable(kind: type[Written], documents: Iterable[bytes | str | None]) -> list[Written]:
    """Workers are upgraded before gateways: what a newer one adds to a document is left out, and a document that makes
    no sense without it harms no other."""
    found = []
    for document in documents:
        with contextlib.suppress(ValidationError):
            if document is not None:
                found.append(kind.model_validate_json(document, extra="ignore"))
    return found
