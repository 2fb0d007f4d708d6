"""RQ's private surface, all of it: key formats, the job hash, registries and worker registration (rq 2.12).

RQ's own tools (`rq info`, rq-dashboard) read what is written here. RQ expires started jobs by local whole seconds and
calls that clean-up from mere counts; so its registries get a far expiry (`RQ_EXECUTION_SECONDS`) and our own leases, in
Redis time, decide which execution is dead.
"""

import json
import zlib
from datetime import datetime
from typing import Any, Final

from redis import Redis
from redis.client import Pipeline
from rq import Queue, SimpleWorker
from rq.executions import Execution, ExecutionRegistry
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.job import JobStatus as RqStatus
from rq.registry import BaseRegistry, CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.worker.base import WorkerStatus
from rq.worker_registration import REDIS_WORKER_KEYS

from contract.spec import JobSpec, JobStatus

JOB_FUNCTION: Final = "worker.batch_worker.run"
QUEUES_KEY: Final = Queue.redis_queues_keys
RQ_EXECUTION_SECONDS: Final = 30 * 86400

STATUS: Final[dict[str, JobStatus]] = {
    RqStatus.QUEUED.value: JobStatus.QUEUED,
    RqStatus.STARTED.value: JobStatus.RUNNING,
    RqStatus.FINISHED.value: JobStatus.SUCCEEDED,
    RqStatus.FAILED.value: JobStatus.FAILED,
    RqStatus.CANCELED.value: JobStatus.CANCELLED,
}
_ENDED_REGISTRIES: Final[tuple[type[BaseRegistry], ...]] = (FinishedJobRegistry, FailedJobRegistry, CanceledJobRegistry)


def queue_key(queue: str) -> str:
    """The list of waiting job ids."""
    return f"{Queue.redis_queue_namespace_prefix}{queue}"


def intermediate_key(queue: str) -> str:
    """The list of ids that are taken and not yet admitted."""
    return IntermediateQueue.get_intermediate_queue_key(queue_key(queue))


def job_key(job_id: str) -> str:
    return Job.key_for(job_id)


def started_key(queue: str) -> str:
    return StartedJobRegistry.key_template.format(queue)


def job_fields(spec: JobSpec, queue: str, connection: Redis) -> dict[str, Any]:
    """RQ's hash of a newly queued job. `connection` is never used for input or output here."""
    job = Queue(queue, connection=connection, serializer=JSONSerializer).create_job(
        JOB_FUNCTION,
        args=(json.loads(spec.to_json()),),
        job_id=spec.id,
        timeout=-1,
        description=f"{spec.task} {spec.model}",  # RQ's default would show the prompt in every tool and log
    )
    job.enqueued_at = job.created_at
    return job.to_dict()


def stored_spec(compressed: bytes) -> JobSpec:
    """The spec inside RQ's `data` field. Raises ValueError (also pydantic's) where it is none that we can read."""
    return _called_with(zlib.decompress(compressed))


def job_spec(job: Job) -> JobSpec:
    """The spec of a fetched job. Raises ValueError (also pydantic's) where it is none that we can read."""
    return _called_with(job.data)


def _called_with(data: bytes) -> JobSpec:
    """RQ's call is [function, instance, args, kwargs]; only our own function counts, and nothing is imported."""
    call = json.loads(data)
    if not isinstance(call, list) or len(call) != 4 or call[0] != JOB_FUNCTION or len(call[2]) != 1:
        raise ValueError(f"RQ job data is no call of {JOB_FUNCTION} with one argument, the job spec")
    return JobSpec.from_json(json.dumps(call[2][0]))


def fetch(job_id: str, connection: Redis) -> Job:
    """Raises `rq.exceptions.NoSuchJobError`."""
    return Job.fetch(job_id, connection=connection, serializer=JSONSerializer)


def fetch_many(job_ids: list[str], connection: Redis) -> list[Job | None]:
    return Job.fetch_many(job_ids, connection=connection, serializer=JSONSerializer)


def status_of(job: Job) -> JobStatus | None:
    """As read by the last fetch; None for states that our jobs never have."""
    status = job.get_status(refresh=False)
    return STATUS.get(status.value if isinstance(status, RqStatus) else str(status))


def start(job: Job, worker_name: str, pipeline: Pipeline) -> str:
    """Queues the writes that make `job` started; returns the new execution's id."""
    pipeline.delete(ExecutionRegistry.key_template.format(job.id))  # of a crashed execution: else RQ's delete raises
    execution = Execution.create(job, RQ_EXECUTION_SECONDS, pipeline=pipeline, worker_name=worker_name)
    job.prepare_for_execution(worker_name, pipeline)
    pipeline.persist(job.key)
    return execution.id


def drop_execution(job: Job, execution_id: str, pipeline: Pipeline) -> None:
    Execution(execution_id, job.id, connection=job.connection).delete(job, pipeline)


def to_front(job: Job, pipeline: Pipeline) -> None:
    """Queues the writes that put a started job back at the head of its queue."""
    job.worker_name, job.started_at = "", None
    job.set_status(RqStatus.QUEUED, pipeline=pipeline)
    job.save(pipeline=pipeline, include_meta=False, include_result=False)
    pipeline.lpush(queue_key(job.origin), job.id)


def end_succeeded(job: Job, ended_at: datetime, keys: list[str], keep_seconds: int, pipeline: Pipeline) -> None:
    """RQ's result holds only the store keys, for its tools; ours is in the job's own hash."""
    job.ended_at = ended_at
    job._result = keys
    job._handle_success(keep_seconds, pipeline=pipeline, worker_name=job.worker_name or "")
    job.cleanup(keep_seconds, pipeline=pipeline, remove_from_queue=False)


def end_failed(job: Job, ended_at: datetime, detail: str, keep_seconds: int, pipeline: Pipeline) -> None:
    job.ended_at = ended_at
    job.failure_ttl = keep_seconds
    job.set_status(RqStatus.FAILED, pipeline=pipeline)
    pipeline.lrem(queue_key(job.origin), 0, job.id)
    job._handle_failure(detail, pipeline, worker_name=job.worker_name or "")


def end_cancelled(job: Job, ended_at: datetime, keep_seconds: int, pipeline: Pipeline) -> None:
    job.ended_at = ended_at
    job.set_status(RqStatus.CANCELED, pipeline=pipeline)
    job.save(pipeline=pipeline, include_meta=False, include_result=False)
    pipeline.lrem(queue_key(job.origin), 0, job.id)
    registry = CanceledJobRegistry(job.origin, connection=job.connection, serializer=JSONSerializer)
    registry.add(job, pipeline=pipeline)
    job.cleanup(keep_seconds, pipeline=pipeline, remove_from_queue=False)


def delete_ended(job_id: str, queue: str, pipeline: Pipeline) -> None:
    """Removes an ended job from RQ altogether."""
    for registry in _ENDED_REGISTRIES:
        pipeline.zrem(registry.key_template.format(queue), job_id)
    pipeline.delete(
        Job.key_for(job_id),
        Result.get_key(job_id),  # type: ignore[no-untyped-call]
        ExecutionRegistry.key_template.format(job_id),
        Job.dependents_key_for(job_id),
    )


def forget_worker(name: str, pipeline: Pipeline) -> None:
    """Takes a worker that died without saying so off RQ's lists; its queues' own lists RQ cleans by itself."""
    key = f"{SimpleWorker.redis_worker_namespace_prefix}{name}"
    pipeline.srem(REDIS_WORKER_KEYS, key)
    pipeline.delete(key)


class WorkerRegistration:
    """Makes our worker visible to RQ's tools: name, queues, busy or idle, counts of finished and failed jobs.

    `connection` must be its own: RQ changes the socket timeout of the pool that it is given.
    """

    def __init__(self, name: str, queues: list[str], connection: Redis, ttl_seconds: int) -> None:
        self._worker = SimpleWorker(
            queues, name=name, connection=connection, serializer=JSONSerializer, worker_ttl=ttl_seconds
        )
        self._busy: bool | None = None

    def birth(self) -> None:
        self._worker.register_birth()  # type: ignore[no-untyped-call]
        self.beat(busy=False)

    def beat(self, busy: bool) -> None:
        if busy != self._busy:
            self._worker.set_state(WorkerStatus.BUSY if busy else WorkerStatus.IDLE)
            self._busy = busy
        self._worker.heartbeat()

    def count(self, succeeded: bool) -> None:
        if succeeded:
            self._worker.increment_successful_job_count()
        else:
            self._worker.increment_failed_job_count()

    def death(self) -> None:
        self._worker.register_death()  # type: ignore[no-untyped-call]
