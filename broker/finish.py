"""How a job leaves an execution: ended for good, or back to the queue. Fenced: whoever lost the job changes nothing.

One WATCH/MULTI writes RQ's state, our own, the terminal event and the counters, so what is counted is what is stored.
The fence is the `execution` field of the job's hash (absent while the job waits) together with RQ's status.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError
from redis.typing import EncodableT, FieldT
from rq.exceptions import NoSuchJobError
from rq.job import Job

from broker import resume, rq_surface
from broker.connection import as_datetime, redis_time, text
from broker.events import add_event
from broker.resume import ResumeStore, SavedWork
from contract import keys, metrics
from contract.events import CancelledEvent, FailedEvent, QueuedEvent, SucceededEvent
from contract.settings import Settings
from contract.spec import JobSpec, JobStatus

Outcome = SucceededEvent | FailedEvent | CancelledEvent
T = TypeVar("T")

# Redis forgets by itself what no janitor came to delete.
_BACKSTOP_SECONDS: Final = 3600
_STATUS: Final = {
    "succeeded": JobStatus.SUCCEEDED,
    "failed": JobStatus.FAILED,
    "cancelled": JobStatus.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class Holding:
    """The state that a transaction was decided on: `execution_id` is None for a job that waits."""

    job: Job
    status: JobStatus | None
    execution_id: str | None
    now: float


def transact(connection: Redis, job_id: str, decide: Callable[[Holding, Pipeline], T]) -> T | None:
    """Watches the job, reads it, and lets `decide` queue writes; begins again when somebody else wrote meanwhile.

    None: there is no such job. `decide` calls `pipeline.multi()` before its first write, if it writes.
    """
    with connection.pipeline() as pipeline:
        while True:
            try:
                pipeline.watch(rq_surface.job_key(job_id), keys.job(job_id))  # type: ignore[no-untyped-call]
                try:
                    job = rq_surface.fetch(job_id, connection)
                except NoSuchJobError:
                    return None
                execution = connection.hget(keys.job(job_id), "execution")
                status = rq_surface.status_of(job)
                holding = Holding(job, status, text(execution) if execution else None, redis_time(connection))
                answer = decide(holding, pipeline)
                pipeline.execute()
                return answer
            except WatchError:
                continue


class Finisher:
    """Ends executions and waiting jobs. Thread-safe; used by workers, by cancel and by the sweep alike."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._resume = ResumeStore(connection, settings)

    def end(self, job_id: str, execution_id: str | None, outcome: Outcome) -> bool:
        """Ends the job if `execution_id` still holds it (None: if it still waits); else False."""

        def decide(holding: Holding, pipeline: Pipeline) -> bool:
            wanted = JobStatus.QUEUED if execution_id is None else JobStatus.RUNNING
            if holding.status is not wanted or holding.execution_id != execution_id:
                return False
            pipeline.multi()
            if execution_id is not None:
                self._release(holding, pipeline)
            self._end_in_rq(holding, outcome, pipeline)
            self._end_in_ours(holding, outcome, pipeline)
            return True

        return bool(transact(self._connection, job_id, decide))

    def requeue(
        self, job_id: str, execution_id: str, reason: Literal["abandoned", "handed_back"], work: SavedWork | None = None
    ) -> bool:
        """Puts the job back at the head of its queue if `execution_id` still holds it; `work` is saved with it."""

        def decide(holding: Holding, pipeline: Pipeline) -> bool:
            if holding.status is not JobStatus.RUNNING or holding.execution_id != execution_id:
                return False
            spec = _spec_or_none(holding.job)
            pipeline.multi()
            self._release(holding, pipeline)
            rq_surface.to_front(holding.job, pipeline)
            pipeline.hdel(keys.job(job_id), "started_at")
            if spec is None or spec.deadline_seconds is None:
                pipeline.zadd(keys.deadlines(), {job_id: holding.now + self._settings.queue_deadline_seconds})
            if reason == "abandoned":
                pipeline.hincrby(keys.job(job_id), "abandonments", 1)
                model = spec.model if spec else "unknown"
                pipeline.hincrby(keys.counters(), keys.counter(metrics.EXECUTIONS_REAPED.name, model), 1)
            if spec is not None and work is not None:
                self._resume.add(spec, work, pipeline)
            add_event(job_id, QueuedEvent(reason=reason), pipeline)
            return True

        return bool(transact(self._connection, job_id, decide))

    def count_fenced(self, model: str) -> None:
        """A result came too late and was thrown away."""
        self._connection.hincrby(keys.counters(), keys.counter(metrics.RESULTS_FENCED.name, model), 1)

    def _release(self, holding: Holding, pipeline: Pipeline) -> None:
        job_id, execution_id = holding.job.id, holding.execution_id
        assert execution_id is not None
        rq_surface.drop_execution(holding.job, execution_id, pipeline)
        pipeline.hdel(keys.job(job_id), "execution")
        pipeline.zrem(keys.leases(), f"{job_id}:{execution_id}")
        pipeline.delete(keys.progress(job_id), keys.preview(job_id))

    def _end_in_rq(self, holding: Holding, outcome: Outcome, pipeline: Pipeline) -> None:
        ended_at, keep = as_datetime(holding.now), self._settings.retention_seconds + _BACKSTOP_SECONDS
        match outcome:
            case SucceededEvent(result=result):
                store_keys = [picture.key for picture in result.pictures]
                rq_surface.end_succeeded(holding.job, ended_at, store_keys, keep, pipeline)
            case FailedEvent(error=error):
                rq_surface.end_failed(holding.job, ended_at, f"{error.code}: {error.detail}", keep, pipeline)
            case CancelledEvent():
                rq_surface.end_cancelled(holding.job, ended_at, keep, pipeline)

    def _end_in_ours(self, holding: Holding, outcome: Outcome, pipeline: Pipeline) -> None:
        settings, job_id, spec = self._settings, holding.job.id, _spec_or_none(holding.job)
        fields: dict[FieldT, EncodableT] = {"finished_at": f"{holding.now:.6f}"}
        if isinstance(outcome, SucceededEvent):
            fields["result"] = outcome.result.to_json()
        if isinstance(outcome, FailedEvent):
            fields["error"] = outcome.error.model_dump_json()
        pipeline.hset(keys.job(job_id), mapping=fields)
        pipeline.hdel(keys.job(job_id), "stop")
        resume.forget(job_id, pipeline)
        pipeline.expire(keys.job(job_id), settings.retention_seconds + _BACKSTOP_SECONDS)
        pipeline.zrem(keys.deadlines(), job_id)
        pipeline.zadd(keys.ended(), {job_id: holding.now})
        add_event(job_id, outcome, pipeline)
        pipeline.expire(keys.events(job_id), settings.events_retention_seconds)
        if spec is None:
            return
        if spec.inputs:
            pipeline.zadd(keys.inputs_due(), {job_id: holding.now + settings.inputs_retention_seconds})
        pipeline.srem(keys.waiting(spec.api_key_id, spec.model), job_id)
        count_ended(spec, outcome, pipeline)


def count_ended(spec: JobSpec, outcome: Outcome, pipeline: Pipeline) -> None:
    """The lifetime counters of ended jobs and stored pictures."""
    status = _STATUS[outcome.type]
    pipeline.hincrby(keys.counters(), keys.counter(metrics.JOBS_ENDED.name, spec.model, spec.task, status), 1)
    if isinstance(outcome, SucceededEvent):
        pictures = keys.counter(metrics.PICTURES.name, spec.model, spec.task)
        pipeline.hincrby(keys.counters(), pictures, len(outcome.result.pictures))


def _spec_or_none(job: Job) -> JobSpec | None:
    """Even a job that nobody can read must end and be cleaned up."""
    try:
        return rq_surface.job_spec(job)
    except ValueError:
        return None
