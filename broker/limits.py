"""The limits that a submit meets, in Redis: a key's token bucket, its unfinished jobs, the length of a queue."""

from functools import lru_cache
from typing import Final

from redis.asyncio import Redis

from broker import rq_surface
from broker.connection import text
from broker.gathered import GatheredScript
from broker.quotas import Limits, Quota
from contract import keys
from contract.errors import ErrorCode
from contract.spec import Priority

_QUEUE_FULL_RETRY_SECONDS: Final = 5.0

LUA_LIMITS: Final = """
local max_depth, max_waiting = tonumber(ARGV[1]), tonumber(ARGV[2])
local per_second, burst = tonumber(ARGV[3]), tonumber(ARGV[4])
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local bucket = redis.call('HMGET', rate, 'tokens', 'at')
local since = math.max(0, now - (tonumber(bucket[2]) or now))
local tokens = math.min(burst, (tonumber(bucket[1]) or burst) + since * per_second)
local unfinished, depth = redis.call('SCARD', waiting), redis.call('LLEN', queue)
local function say(outcome, value) return {outcome, value, tostring(tokens), unfinished} end
local function refusal()
  if tokens < 1 then return say('rate_limited', tostring((1 - tokens) / per_second)) end
  if depth >= max_depth then return say('queue_full', tostring(depth)) end
  if unfinished >= max_waiting then return say('key_full', tostring(max_waiting)) end
end
"""
"""Wants `queue`, `waiting` and `rate`, and `arguments` first among ARGV; gives `refusal` and what it goes by."""

_CHECK: Final = f"""
local idempotency, queue, waiting, rate = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
{LUA_LIMITS}
local known = redis.call('EXISTS', idempotency) == 1  -- to repeat a request costs nothing
return not known and refusal() or say('accepted', '')
"""


class SubmitRefusedError(Exception):
    """Nothing was queued. `code` is queue_full, rate_limited or idempotency_mismatch; `retry_after` in seconds."""

    def __init__(self, code: ErrorCode, detail: str, quota: Quota, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.quota = quota
        self.retry_after = retry_after


class LimitCheck:
    """Whether a submit would be refused, before anything is done for it. Takes nothing: the submit itself counts."""

    def __init__(self, connection: Redis, max_depth: int) -> None:
        self._script = GatheredScript(connection, _CHECK)
        self._max_depth = max_depth

    async def __call__(
        self, model: str, priority: Priority, api_key_id: str | None, idempotency_key: str | None, limits: Limits
    ) -> None:
        """Raises `SubmitRefusedError`; not where the Idempotency-Key was used before."""
        answer, value, tokens, unfinished = await self._script(
            keys=(
                keys.idempotency(api_key_id, idempotency_key or ""),
                rq_surface.queue_key(keys.queue_name(model, priority)),
                keys.waiting(api_key_id, model),
                keys.rate(api_key_id),
            ),
            args=arguments(limits, self._max_depth),
        )
        if text(answer) != "accepted":
            raise refused(model, text(answer), text(value), Quota(limits, float(tokens), unfinished))


@lru_cache(maxsize=4096)
def arguments(limits: Limits, max_depth: int) -> tuple[bytes, ...]:
    """Of `LUA_LIMITS`."""
    numbers = (max_depth, limits.max_waiting, limits.rate_per_second, limits.rate_burst)
    return tuple(str(number).encode() for number in numbers)


def refused(model: str, answer: str, value: str, quota: Quota) -> SubmitRefusedError:
    """For what `refusal` said."""
    if answer == "rate_limited":
        detail = f"more than {quota.limits.rate_per_second:g} requests per second; wait and repeat the request"
        return SubmitRefusedError(ErrorCode.RATE_LIMITED, detail, quota, float(value))
    whose = "your unfinished jobs" if answer == "key_full" else "the waiting jobs"
    detail = f"{whose} for {model} have reached the limit of {value}; wait for some to end and repeat the request"
    return SubmitRefusedError(ErrorCode.QUEUE_FULL, detail, quota, _QUEUE_FULL_RETRY_SECONDS)
