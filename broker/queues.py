"""How long the queues have kept somebody waiting."""

from collections.abc import Iterable
from typing import Final

from redis.asyncio import Redis as AsyncRedis

from broker import rq_surface
from contract import keys
from contract.spec import Priority

# KEYS: RQ's queues; ARGV: prefix of our job hashes. Answers one number of seconds per queue, as text.
_AGES: Final = """
local clock = redis.call('TIME')
local ages = {}
for i, queue in ipairs(KEYS) do
  local head = redis.call('LINDEX', queue, 0)
  local created = head and tonumber(redis.call('HGET', ARGV[1] .. head, 'created_at') or nil)
  ages[i] = string.format('%.3f', created and math.max(0, clock[1] + clock[2] / 1000000 - created) or 0)
end
return ages
"""


async def read_ages(connection: AsyncRedis, models: Iterable[str]) -> dict[tuple[str, Priority], float]:
    """Seconds since the job at the head of each queue was submitted, by Redis' clock; 0.0 for an empty queue.

    Jobs that came back from a worker stand at the head, older than all others.
    """
    queues = [(model, priority) for model in models for priority in Priority]
    if not queues:
        return {}
    names = [rq_surface.queue_key(keys.queue_name(model, priority)) for model, priority in queues]
    ages = await connection.eval(_AGES, len(names), *names, keys.job(""))
    return {queue: float(age) for queue, age in zip(queues, ages, strict=True)}
