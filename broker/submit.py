"""One atomic submit: idempotency, rate limit, caps, enqueue and the queued event in one script, in Redis time."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from redis.asyncio import Redis as AsyncRedis
from redis.typing import EncodableT

from broker import rq_surface
from broker.connection import text
from broker.events import MAX_EVENTS
from broker.gathered import GatheredScript
from broker.jobs import JobRecord
from broker.limits import LUA_LIMITS, SubmitRefusedError, arguments, refused
from broker.quotas import Limits, Quota
from contract import keys, metrics
from contract.errors import ErrorCode
from contract.events import QueuedEvent
from contract.settings import Settings
from contract.spec import JobSpec, JobStatus, Priority, Task

# A retry of the whole script (redis-py repeats a command whose answer got lost) finds the job and changes nothing.
_QUEUED: Final = QueuedEvent().model_dump_json()
_SUBMIT: Final = (
    f"""{rq_surface.LUA_CREATE}
local MAX_EVENTS, QUEUED = {MAX_EVENTS}, '{_QUEUED}'
"""
    + """
local LONGEST = 30 * 86400  -- a bucket that nobody touches for so long counts as full
local rq_job, job, events, idempotency, queue = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local jobs_of, waiting, rate, deadlines, counters, rq_queues = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local line, turns, all_jobs, running_limits, first_queue = KEYS[12], KEYS[13], KEYS[14], KEYS[15], KEYS[16]
local max_running, counter, steps_counter, queue_name = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local model, owner, description = ARGV[9], ARGV[10], ARGV[11]
local id, body_hash, patience, remember = ARGV[12], ARGV[13], tonumber(ARGV[14]), ARGV[15]
local deadline, steps, data, stamp = ARGV[16], ARGV[17], ARGV[18], ARGV[19]
"""
    + LUA_LIMITS
    + """
if redis.call('EXISTS', rq_job) == 1 then return say('accepted', id) end
if body_hash ~= '' then
  local known = redis.call('HMGET', idempotency, 'body', 'job')
  if known[1] then
    if known[1] == body_hash then return say('repeated', known[2]) end
    return say('mismatch', known[2])
  end
end

local no = refusal()
if no then return no end

tokens, unfinished = tokens - 1, unfinished + 1
redis.call('HSET', rate, 'tokens', tostring(tokens), 'at', string.format('%.6f', now))
redis.call('EXPIRE', rate, math.min(math.ceil(burst / per_second) + 1, LONGEST))
if max_running ~= '' then
  redis.call('HSET', running_limits, owner, max_running)
else
  redis.call('HDEL', running_limits, owner)
end
rq_create(rq_job, data, description, queue_name, stamp)
redis.call('HSET', job, 'created_at', string.format('%.6f', now), 'model', model, 'owner', owner,
  'steps', steps)
if deadline ~= '' then redis.call('HSET', job, 'deadline', string.format('%.6f', now + tonumber(deadline))) end
redis.call('SADD', rq_queues, queue)
redis.call('RPUSH', queue, id)
redis.call('RPUSH', line, id)
redis.call('ZADD', turns, 'NX', string.format('%.6f', now), owner)
redis.call('SADD', waiting, id)
local microseconds = string.format('%d', clock[1] * 1000000 + clock[2])
redis.call('ZADD', jobs_of, microseconds, id)
redis.call('ZADD', all_jobs, microseconds, id)
redis.call('ZADD', deadlines, string.format('%.6f', now + patience), id)
redis.call('HINCRBY', counters, counter, 1)
redis.call('HINCRBY', counters, steps_counter, steps)
redis.call('XADD', events, 'MAXLEN', MAX_EVENTS, '*', 'event', QUEUED)
if body_hash ~= '' then
  redis.call('HSET', idempotency, 'body', body_hash, 'job', id)
  redis.call('EXPIRE', idempotency, remember)
end
local answer = say('accepted', id)
answer[5] = string.format('%.6f', now)
answer[6] = first_queue == queue and depth or depth + redis.call('LLEN', first_queue)
return answer
"""
)
_SHARED_BY: Final = 4096  # API keys times models: what of them is kept ready


@dataclass(frozen=True, slots=True)
class Submitted:
    """`job_id` differs from the spec's where the Idempotency-Key had been used: then `created` is False.

    `record` is the job as it stood when it was queued; None where this call did not queue it."""

    job_id: str
    created: bool
    quota: Quota | None = field(default=None, compare=False)
    record: JobRecord | None = field(default=None, compare=False)


class Submitter:
    """Holds the registered script; one per gateway process."""

    def __init__(self, connection: AsyncRedis, settings: Settings) -> None:
        self._script = GatheredScript(connection, _SUBMIT)
        self._settings = settings

    async def submit(
        self,
        spec: JobSpec,
        idempotency_key: str | None = None,
        body_hash: str | None = None,
        limits: Limits | None = None,
    ) -> Submitted:
        """Queues `spec` or raises `SubmitRefusedError`.

        `body_hash` identifies the request's body, taken before a seed is drawn; required with an `idempotency_key`.
        `limits` are those of the spec's API key; without them the settings' count.
        """
        if (idempotency_key is None) != (body_hash is None):
            raise ValueError("idempotency_key and body_hash go together: give both or neither")
        limits = limits or Limits.of(self._settings)
        answer, value, tokens, unfinished, *queued = await self._script(
            keys=(*_own_keys(spec, idempotency_key), *_shared_keys(spec.model, spec.priority, spec.api_key_id)),
            args=(
                *arguments(limits, self._settings.max_queue_depth),
                limits.max_running or b"",
                *_shared_arguments(spec.model, spec.task, spec.priority, spec.api_key_id),
                *self._own_arguments(spec, body_hash),
            ),
        )
        job_id, created = _outcome(spec, text(answer), text(value), quota := Quota(limits, float(tokens), unfinished))
        return Submitted(job_id, created, quota, _queued(spec, *queued) if queued else None)

    def _own_arguments(self, spec: JobSpec, body_hash: str | None) -> tuple[EncodableT, ...]:
        settings = self._settings
        return (
            spec.id,
            body_hash or b"",
            min(settings.queue_deadline_seconds, spec.deadline_seconds or settings.queue_deadline_seconds),
            settings.idempotency_seconds,
            spec.deadline_seconds or b"",
            spec.n * spec.steps,
            rq_surface.call_data(spec),
            rq_surface.timestamp(),
        )


def _own_keys(spec: JobSpec, idempotency_key: str | None) -> tuple[str, ...]:
    return (
        rq_surface.job_key(spec.id),
        keys.job(spec.id),
        keys.events(spec.id),
        keys.idempotency(spec.api_key_id, idempotency_key or ""),
    )


# What follows is the same for many jobs, and made once for all of them.


@lru_cache(maxsize=_SHARED_BY)
def _shared_keys(model: str, priority: Priority, api_key_id: str | None) -> tuple[bytes, ...]:
    queue = keys.queue_name(model, priority)
    names = (
        rq_surface.queue_key(queue),
        keys.jobs_of(api_key_id),
        keys.waiting(api_key_id, model),
        keys.rate(api_key_id),
        keys.deadlines(),
        keys.counters(),
        rq_surface.QUEUES_KEY,
        keys.line(queue, api_key_id),
        keys.turns(queue),
        keys.all_jobs(),
        keys.running_limits(),
        rq_surface.queue_key(keys.queue_names(model)[0]),
    )
    return tuple(name.encode() for name in names)


@lru_cache(maxsize=_SHARED_BY)
def _shared_arguments(model: str, task: Task, priority: Priority, api_key_id: str | None) -> tuple[bytes, ...]:
    names = (
        keys.counter(metrics.JOBS_SUBMITTED.name, model, task, priority),
        keys.counter(metrics.STEPS_SUBMITTED.name, model),
        keys.queue_name(model, priority),
        model,
        api_key_id or keys.ANONYMOUS,
        f"{task} {model}",  # RQ's own description would show the prompt in every tool and log
    )
    return tuple(name.encode() for name in names)


def _queued(spec: JobSpec, created_at: bytes, ahead: int) -> JobRecord:
    return JobRecord(
        spec=spec,
        status=JobStatus.QUEUED,
        created_at=float(created_at),
        started_at=None,
        finished_at=None,
        queue_position=ahead,
        step=0,
        steps=spec.steps,
        warnings=(),
        result=None,
        error=None,
    )


def _outcome(spec: JobSpec, answer: str, value: str, quota: Quota) -> tuple[str, bool]:
    """The job's id, and whether it is a new one."""
    if answer in ("accepted", "repeated"):
        return value, answer == "accepted"
    if answer == "mismatch":
        raise SubmitRefusedError(
            ErrorCode.IDEMPOTENCY_MISMATCH,
            f"this Idempotency-Key made job {value} from another body; repeat that body or use a new key",
            quota,
        )
    raise refused(spec.model, answer, value, quota)
