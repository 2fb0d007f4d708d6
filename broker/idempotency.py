"""Idempotency-Keys of requests whose way to the queue is long, since their pictures are stored first.

The submit script alone decides which request makes the job. A claim only spares the work of those that come while the
first is under way: one that ends too early costs that work and breaks nothing.
"""

from typing import Final
from uuid import uuid4

from redis.asyncio import Redis

from contract import keys

CLAIM_SECONDS: Final = 60

# KEYS: claim; ARGV: token, seconds.
_CLAIM: Final = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2]) then return 1 end
return redis.call('GET', KEYS[1]) == ARGV[1] and 1 or 0
"""
_RELEASE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class Claims:
    """One per gateway process."""

    def __init__(self, connection: Redis) -> None:
        self._claim = connection.register_script(_CLAIM)
        self._release = connection.register_script(_RELEASE)

    async def claim(self, api_key_id: str | None, idempotency_key: str) -> str | None:
        """A token to release the claim with; None: another request with this key is on its way to the queue."""
        token = uuid4().hex
        claimed = await self._claim(
            keys=[keys.idempotency_claim(api_key_id, idempotency_key)], args=[token, CLAIM_SECONDS]
        )
        return token if claimed else None

    async def release(self, api_key_id: str | None, idempotency_key: str, token: str) -> None:
        """Whether or not it still holds."""
        await self._release(keys=[keys.idempotency_claim(api_key_id, idempotency_key)], args=[token])
