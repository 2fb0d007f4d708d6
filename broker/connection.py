"""Redis connections as every part of the broker expects them: bytes in and out, RESP 2, bounded waits."""

from datetime import UTC, datetime
from typing import Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.client import Pipeline
from redis.exceptions import BusyLoadingError, MaxConnectionsError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

# Catch these to answer that Redis is away; any other RedisError is a defect of ours.
REDIS_UNAVAILABLE: Final = (
    RedisConnectionError,
    RedisTimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    MaxConnectionsError,
)

_CONNECT_SECONDS: Final = 5.0
_ANSWER_SECONDS: Final = 10.0


def connect(url: str) -> Redis:
    """A thread-safe client; connects at first use."""
    return Redis.from_url(
        url,
        protocol=2,
        socket_connect_timeout=_CONNECT_SECONDS,
        socket_timeout=_ANSWER_SECONDS,
        health_check_interval=30,
    )


def connect_async(url: str) -> AsyncRedis:
    """The same for one event loop; blocking reads must stay shorter than its socket timeout."""
    return AsyncRedis.from_url(
        url,
        protocol=2,
        socket_connect_timeout=_CONNECT_SECONDS,
        socket_timeout=_ANSWER_SECONDS,
        health_check_interval=30,
    )


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def redis_time(connection: Redis | Pipeline) -> float:
    """Redis' clock, Unix seconds: the only clock that leases and retention go by."""
    seconds, microseconds = connection.time()
    return seconds + microseconds / 1e6


def as_datetime(unix_seconds: float) -> datetime:
    return datetime.fromtimestamp(unix_seconds, UTC)
