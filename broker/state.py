"""One reading of a job, as those see it who decide what becomes of it: cancel, sweep and whoever follows a death."""

from dataclasses import dataclass

from redis import Redis

from broker import resume, rq_surface
from broker.connection import text
from broker.deaths import Deaths
from broker.events import Progress
from broker.stops import Stop
from contract import keys
from contract.spec import JobSpec, JobStatus


@dataclass(frozen=True, slots=True)
class JobRef:
    """A job and what never changes about it. Even one that nobody can read (no spec) must end and be cleaned up."""

    job_id: str
    queue: str
    spec: JobSpec | None

    @classmethod
    def of(cls, spec: JobSpec) -> "JobRef":
        return cls(spec.id, keys.queue_name(spec.model, spec.priority), spec)


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
    pipeline = connection.pipeline(transaction=True)
    pipeline.hmget(rq_surface.job_key(job_id), ["status", "origin", "data"])
    pipeline.hgetall(keys.job(job_id))
    pipeline.get(keys.progress(job_id))
    pipeline.hget(keys.resume(job_id), resume.STEPS)
    (status, queue, data), ours, progress, steps = pipeline.execute()
    if status is None:
        return None
    saved = int(steps or 0)
    return JobState(
        ref=JobRef(job_id, text(queue or ""), _spec_or_none(data)),
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
