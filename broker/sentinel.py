"""Connections that go wherever the Sentinels say that the primary is.

redis-py's own for this reconnect to the address they had, so a command that is tried again meets the old primary again;
and their pools fail where ours wait.
"""
# mypy: disable-error-code="no-untyped-call"
# redis-py's annotations have gaps.

import asyncio
from typing import Any, Final

from redis import BlockingConnectionPool, Redis
from redis.asyncio import BlockingConnectionPool as AsyncBlockingConnectionPool
from redis.asyncio.connection import Connection as AsyncConnection
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, parse_url
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from contract.redis_url import Address, SentinelUrl

_SENTINEL_SECONDS: Final = 1.0  # to connect and to answer, each: a machine that is gone answers nothing


class Sentinels:
    """Thread-safe; one for all connections of a client. `primary` is the latest answer."""

    def __init__(self, url: SentinelUrl) -> None:
        self.primary: Address | None = None
        self._service = url.service
        self._addresses = url.sentinels
        certificates = {name: value for name, value in parse_url(url.server).items() if name.startswith("ssl_")}
        self._options = certificates | {
            "ssl": url.tls,
            "username": url.username,
            "password": url.password,
            "protocol": 2,
            "socket_connect_timeout": _SENTINEL_SECONDS,
            "socket_timeout": _SENTINEL_SECONDS,
            "retry": Retry(NoBackoff(), 0),
        }

    def find(self) -> Address:
        """Asks the Sentinels in turn, first the one that answered last. Raises redis' ConnectionError, also while the
        primary is down and no other has been chosen."""
        failures = []
        for address in self._addresses:
            try:
                self.primary = found = self._ask(*address)
            except RedisError as error:
                failures.append(f"{address[0]}:{address[1]}: {error}")
                continue
            self._addresses = (address, *(other for other in self._addresses if other != address))
            return found
        raise RedisConnectionError(f"no Sentinel knows where {self._service!r} is ({'; '.join(failures)})")

    def _ask(self, host: str, port: int) -> Address:
        with Redis(host=host, port=port, **self._options) as sentinel:
            state: Any = sentinel.sentinel_masters().get(self._service)
        if state is None:
            raise RedisError("watches no such service")
        if state["is_sdown"] or state["is_odown"] or not state["is_master"]:
            raise RedisError(f"{state['ip']}:{state['port']} is down and no other chosen yet")
        return str(state["ip"]), int(state["port"])


class PrimaryConnection(Connection):
    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        self._sentinels = sentinels
        super().__init__(**options)

    def connect(self) -> None:
        """The pool calls this whenever it gives the connection away."""
        if self.is_connected and (self.host, self.port) != self._sentinels.primary:
            self.disconnect()
        super().connect()

    def _connect(self) -> Any:
        self.host, self.port = self._sentinels.find()
        return super()._connect()


class PrimarySSLConnection(PrimaryConnection, SSLConnection):
    pass


class AsyncPrimaryConnection(AsyncConnection):
    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        self._sentinels = sentinels
        super().__init__(**options)

    async def connect(self) -> None:
        """As above."""
        if self.is_connected and (self.host, self.port) != self._sentinels.primary:
            await self.disconnect()
        await super().connect()

    async def _connect(self) -> None:
        self.host, self.port = await asyncio.to_thread(self._sentinels.find)
        await super()._connect()


class AsyncPrimarySSLConnection(AsyncPrimaryConnection, AsyncSSLConnection):
    pass


def primary_pool(url: SentinelUrl, **options: Any) -> BlockingConnectionPool:
    """`options` are a pool's and its connections'; those of the URL come before them."""
    kind = PrimarySSLConnection if url.tls else PrimaryConnection
    return BlockingConnectionPool.from_url(url.server, connection_class=kind, sentinels=Sentinels(url), **options)


def async_primary_pool(url: SentinelUrl, **options: Any) -> AsyncBlockingConnectionPool:
    kind = AsyncPrimarySSLConnection if url.tls else AsyncPrimaryConnection
    return AsyncBlockingConnectionPool.from_url(url.server, connection_class=kind, sentinels=Sentinels(url), **options)
