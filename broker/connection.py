"""Redis connections as every part of the broker expects them: bytes in and out, RESP 2, bounded waits."""

from typing import Any, Final

from redis import BlockingConnectionPool, Redis
from redis.asyncio import BlockingConnectionPool as AsyncBlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.connection import Connection as AsyncConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.connection import HiredisRespSerializer
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.typing import EncodableT

from broker.refusals import AsyncRefusalParser, RefusalParser, WritesRefusedError
from broker.sentinel import async_primary_pool, primary_pool
from contract.redis_url import parse_redis_url

# Catch these to answer that Redis is away, or takes no writes; any other RedisError is a defect of ours.
REDIS_UNAVAILABLE: Final = (RedisConnectionError, RedisTimeoutError, WritesRefusedError)

_CONNECT_SECONDS: Final = 5.0
_ANSWER_SECONDS: Final = 10.0
_MAX_CONNECTIONS: Final = 64  # beyond that, callers wait their turn instead of failing
_RETRIES: Final = 4  # about a second in all; a repeated command may run twice, which every caller here must bear


def connect(url: str) -> Redis:
    """A thread-safe client; connects at first use. `from_url` of redis-py would retry nothing. Raises ValueError."""
    retry = Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), _RETRIES)
    options = _options() | {"retry": retry, "parser_class": RefusalParser}
    if sentinels := parse_redis_url(url):
        return Redis.from_pool(primary_pool(sentinels, **options))
    return Redis.from_pool(BlockingConnectionPool.from_url(url, **options))


class _AsyncConnection(AsyncConnection):
    """Packs commands in C, as redis-py's synchronous connections do: a submit has forty arguments."""

    _packer: Final = HiredisRespSerializer()

    def pack_command(self, *args: EncodableT) -> list[bytes]:
        packed: list[bytes] = self._packer.pack(*args)  # type: ignore[arg-type] # annotated as if each were a list
        return packed


def connect_async(url: str) -> AsyncRedis:
    """The same for one event loop; blocking reads must stay shorter than `_ANSWER_SECONDS`."""
    retry = AsyncRetry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), _RETRIES)
    options = _options() | {"retry": retry, "parser_class": AsyncRefusalParser}
    if sentinels := parse_redis_url(url):
        return AsyncRedis.from_pool(async_primary_pool(sentinels, **options))
    return AsyncRedis.from_pool(AsyncBlockingConnectionPool.from_url(url, connection_class=_AsyncConnection, **options))


def _options() -> dict[str, Any]:
    return {
        "protocol": 2,
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_timeout": _ANSWER_SECONDS,
        "health_check_interval": 30,
        "max_connections": _MAX_CONNECTIONS,
        "timeout": _ANSWER_SECONDS,  # of the wait for a free connection
    }


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def redis_time(connection: Redis) -> float:
    """Redis' clock, Unix seconds: the only clock that leases and retention go by."""
    seconds, microseconds = connection.time()
    return seconds + microseconds / 1e6
