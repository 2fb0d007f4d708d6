"""One reading of jobs, and what of it those see who decide what becomes of one: cancel, sweep, and after a death."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from redis import Redis

from broker import resume, rq_surface
from broker.connection import text
from broker.deaths import Deaths
from broker.events import Progress
from broker.stops import Stop
from contract import keys
from contract.spec import JobSpec, JobStatus

# KEYS: by `stored_keys`. No transaction, since a full Redis refuses even those that only read.
LUA_STORED: Final = f"""
local jobs = {{}}
for k = 1, #KEYS, 4 do
  jobs[#jobs + 1] = {{redis.call('HMGET', KEYS[k], 'status', 'origin', 'data'), redis.call('HGETALL', KEYS[k + 1]),
    redis.call('GET', KEYS[k + 2]), redis.call('HGET', KEYS[k + 3], '{resume.STEPS}')}}
end
return jobs
"""


class Stored(NamedTuple):
    """What is kept of a job: fields of RQ's hash, all of ours, the value of its progress, saved steps."""

    status: bytes | None
    queue: bytes | None
    data: bytes | None
    ours: dict[bytes, bytes]
    progress: bytes | None
    steps: bytes | None


def stored_keys(job_ids: Iterable[str]) -> list[str]:
    functions = (rq_surface.job_key, keys.job, keys.progress, keys.resume)
    return [key(job_id) for job_id in job_ids for key in functions]


def stored(answer: Sequence[Any]) -> Stored:
    """Of one job."""
    (status, queue, data), ours, progress, steps = answer
    return Stored(status, queue, data, dict(zip(ours[::2], ours[1::2], strict=True)), progress, steps)


@dataclass(frozen=True, slots=True)
class JobRef:
    """A job and what never changes about it. Even one that nobody can read (no spec) must end, be cleaned up and be
    taken off what its submit counted: `owner` is the API key's id, `steps` those of all its pictures."""

    job_id: str
    queue: str
    spec: JobSpec | None
    model: str
    owner: str
    steps: int

    @classmethod
    def of(cls, spec: JobSpec) -> "JobRef":
        queue, owner = keys.queue_name(spec.model, spec.priority), spec.api_key_id or keys.ANONYMOUS
        return cls(spec.id, queue, spec, spec.model, owner, spec.n * spec.steps)


@dataclass(frozen=True, slots=True)
class JobState:
    """`status` None: none that our jobs have. `lost_steps`: denoising steps that were reported and never saved."""

    ref: JobRef
    status: JobStatus | None
    execution_id: str | None
    stop: Stop | None
    deaths: Deaths
    saved_steps: int
    lost_steps: int


def read_state(connection: Redis, job_id: str) -> JobState | None:
    """None: there is no such job."""
    names = stored_keys([job_id])
    (answer,) = connection.eval(LUA_STORED, len(names), *names)
    status, queue, data, ours, progress, steps = stored(answer)
    if status is None:
        return None
    saved, spec = int(steps or 0), _spec_or_none(data)
    told = text(ours.get(b"model", b"unknown")), text(ours.get(b"owner", b"")), int(ours.get(b"steps", 0))
    return JobState(
        ref=JobRef.of(spec) if spec else JobRef(job_id, text(queue or ""), None, *told),
        status=rq_surface.STATUS.get(text(status)),
        execution_id=text(ours[b"execution"]) if b"execution" in ours else None,
        stop=Stop(text(ours[b"stop"])) if b"stop" in ours else None,
        deaths=Deaths.parse(ours),
        saved_steps=saved,
        lost_steps=max(0, Progress.parse(progress).total - saved) if progress else 0,
    )


def _spec_or_none(data: bytes | None) -> JobSpec | None:
    try:
        return rq_surface.stored_spec(data or b"")
    except ValueError:
        return None
