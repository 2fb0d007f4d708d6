"""What one gateway knows of the API keys in Redis. A request asks Redis only when the last answer has grown old."""

import asyncio
import time
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from broker.api_keys import KeyTable, read_table
from broker.connection import REDIS_UNAVAILABLE
from broker.quotas import Limits
from contract.settings import Settings

CACHE_SECONDS: Final = 1.0
"""A made or revoked key is known everywhere after so long, as long as Redis answers."""
_PATIENCE_SECONDS: Final = 2.0


class KeyRing:
    """One per gateway process, inside its event loop."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self._redis = connection
        self._settings = settings
        self._table: KeyTable | None = None
        self._asked_at = float("-inf")
        self._failure: Exception | None = None
        self._asking = asyncio.Lock()

    async def table(self) -> KeyTable:
        """The keys as they were a second ago at most; while Redis is away, as they were last. Raises redis'
        ConnectionError where they were never read."""
        oldest = time.monotonic() - CACHE_SECONDS
        if self._asked_at <= oldest:
            async with self._asking:
                if self._asked_at <= oldest:  # else an answer came while we waited, good or bad
                    await self._ask()
        if self._table is None:
            raise RedisConnectionError("Redis did not give the API keys") from self._failure
        return self._table

    async def limits_of(self, api_key_id: str | None) -> Limits:
        """The key's own limits over those of the settings. Raises as `table`."""
        key = None if api_key_id is None else (await self.table()).keys.get(api_key_id)
        return Limits.of(self._settings, key.limits if key else None)

    async def _ask(self) -> None:
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                self._table = await read_table(self._redis, self._table)
        except (TimeoutError, *REDIS_UNAVAILABLE) as error:
            self._failure = error
            # Those who wait behind us need not find out again; those who come later do, where no keys are known.
            asked_at = time.monotonic() - (CACHE_SECONDS if self._table is None else 0)
        self._asked_at = asked_at
