"""RQ's private surface, all of it: key formats, the job hash, registries and worker registration (rq 2.12).

RQ's own tools (`rq info`, rq-dashboard) read what is written here. RQ expires started jobs by local whole seconds and
calls that clean-up from mere counts; so its registries get a far expiry (`RQ_EXECUTION_SECONDS`) and our own leases, in
Redis time, decide which execution is dead.
"""

import json
import zlib
from collections.abc import Sequence
from typing import Any, Final

from redis import Redis
from redis.client import Pipeline
from redis.typing import EncodableT
from rq import Queue, SimpleWorker
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job
from rq.job import JobStatus as RqStatus
from rq.registry import BaseRegistry, CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import current_timestamp, utcformat
from rq.utils import now as utc_now
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
_STATUS_NAMES: Final = {status: name for name, status in STATUS.items()}
_ENDED_REGISTRIES: Final[tuple[type[BaseRegistry], ...]] = (FinishedJobRegistry, FailedJobRegistry, CanceledJobRegistry)
_NEVER_CONNECTED: Final = Redis()  # RQ's constructors want one
_NEW_JOB: Final = Queue("any", connection=_NEVER_CONNECTED, serializer=JSONSerializer).create_job(
    JOB_FUNCTION, timeout=-1
)
_OWN_FIELDS: Final = ("data", "description", "origin", "created_at")
_FIELDS_OF_ANY_JOB: Final = {
    name: str(value) for name, value in _NEW_JOB.to_dict().items() if name not in (*_OWN_FIELDS, "status")
} | {"status": RqStatus.QUEUED.value}
_CALL: Final = b'["' + JOB_FUNCTION.encode() + b'", null, [%s], {}]'  # function, instance, args, kwargs
_EXECUTION_PREFIX: Final = Execution("", "", _NEVER_CONNECTED).key.removesuffix(":")

RqCommand = tuple[EncodableT, ...]

# rq_start(id, queue, execution, worker, now, stamp): what RQ's own worker writes when it starts a job.
LUA_START: Final = f"""
local function rq_start(id, queue, execution, worker, now, stamp)
  local job, one = '{Job.key_for("")}' .. id, '{_EXECUTION_PREFIX}' .. id .. ':' .. execution
  local executions, ttl = '{ExecutionRegistry.key_template.format("")}' .. id, {RQ_EXECUTION_SECONDS}
  local at, expiry = string.format('%.6f', now), math.floor(now) + ttl
  redis.call('DEL', executions)  -- of a crashed execution: else RQ's delete raises
  redis.call('HSET', one, 'id', execution, 'created_at', at, 'last_heartbeat', at, 'worker_name', worker)
  redis.call('EXPIRE', one, ttl)
  redis.call('ZADD', executions, expiry + 60, execution)
  redis.call('EXPIRE', executions, ttl + 60)
  redis.call('ZADD', '{StartedJobRegistry.key_template.format("")}' .. queue, expiry, id .. ':' .. execution)
  redis.call('HSET', job, 'status', '{RqStatus.STARTED.value}', 'started_at', stamp, 'last_heartbeat', stamp,
    'worker_name', worker)
  redis.call('PERSIST', job)
end
"""


def queue_key(queue: str) -> str:
    """The list of waiting job ids."""
    return f"{Queue.redis_queue_namespace_prefix}{queue}"


def job_key(job_id: str) -> str:
    return Job.key_for(job_id)


def started_key(queue: str) -> str:
    return StartedJobRegistry.key_template.format(queue)


# rq_create(job, data, description, queue, stamp): RQ's hash of a newly queued job.
LUA_CREATE: Final = f"""
local function rq_create(job, data, description, queue, stamp)
  redis.call('HSET', job, 'data', data, 'description', description, 'origin', queue, 'created_at', stamp,
    'enqueued_at', stamp, {", ".join(f"'{name}', '{value}'" for name, value in _FIELDS_OF_ANY_JOB.items())})
end
"""


def call_data(spec: JobSpec) -> bytes:
    """The field `data` of RQ's hash: a call of our function with the spec. To compress its 600 bytes would save 200 of
    them, and take ten times as long."""
    return zlib.compress(_CALL % spec.to_json().encode(), level=0)


def stored_spec(compressed: bytes) -> JobSpec:
    """The spec inside RQ's `data` field. Raises ValueError (also pydantic's) where it is none that we can read.

    RQ's call is [function, instance, args, kwargs]; only our own function counts, and nothing is imported.
    """
    try:
        call = json.loads(zlib.decompress(compressed))
    except zlib.error as error:
        raise ValueError(f"RQ job data is not compressed JSON: {error}") from error
    if not isinstance(call, list) or len(call) != 4 or call[0] != JOB_FUNCTION or len(call[2]) != 1:
        raise ValueError(f"RQ job data is no call of {JOB_FUNCTION} with one argument, the job spec")
    return JobSpec.from_json(json.dumps(call[2][0]))


def status_name(status: JobStatus) -> str:
    """RQ's word for `status`."""
    return _STATUS_NAMES[status]


def timestamp() -> str:
    """The time as RQ writes it into a job's hash, by the local clock."""
    return utcformat(utc_now())


def execution_dropped(job_id: str, execution_id: str, queue: str) -> list[RqCommand]:
    return [
        ("DEL", f"{_EXECUTION_PREFIX}{job_id}:{execution_id}", ExecutionRegistry.key_template.format(job_id)),
        ("ZREM", started_key(queue), f"{job_id}:{execution_id}"),
    ]


def waits_again(job_id: str) -> list[RqCommand]:
    """A started job is queued again; the list of its queue is the caller's."""
    return [("HSET", job_key(job_id), "status", status_name(JobStatus.QUEUED), "started_at", "", "worker_name", "")]


def end_succeeded(job_id: str, queue: str, worker_name: str, keys: Sequence[str], keep: int) -> list[RqCommand]:
    """RQ's result holds only the store keys, for its tools; ours is in the job's own hash. Kept for `keep` seconds."""
    result = _result(job_id, worker_name, Result.Type.SUCCESSFUL, keep, return_value=list(keys))
    return [*_ended(job_id, JobStatus.SUCCEEDED, keep), *result, _registered(FinishedJobRegistry, queue, job_id, keep)]


def end_failed(job_id: str, queue: str, worker_name: str, detail: str, keep: int) -> list[RqCommand]:
    result = _result(job_id, worker_name, Result.Type.FAILED, keep, exc_string=detail)
    return [*_ended(job_id, JobStatus.FAILED, keep), *result, _registered(FailedJobRegistry, queue, job_id, keep)]


def end_cancelled(job_id: str, queue: str, keep: int) -> list[RqCommand]:
    return [*_ended(job_id, JobStatus.CANCELLED, keep), _registered(CanceledJobRegistry, queue, job_id, keep)]


def _ended(job_id: str, status: JobStatus, keep: int) -> list[RqCommand]:
    key = job_key(job_id)
    return [("HSET", key, "status", status_name(status), "ended_at", timestamp()), ("EXPIRE", key, keep)]


def _registered(registry: type[BaseRegistry], queue: str, job_id: str, keep: int) -> RqCommand:
    return ("ZADD", registry.key_template.format(queue), current_timestamp() + keep, job_id)


def _result(job_id: str, worker_name: str, kind: Result.Type, keep: int, **outcome: Any) -> list[RqCommand]:
    result = Result(
        job_id, kind, connection=_NEVER_CONNECTED, worker_name=worker_name, serializer=JSONSerializer, **outcome
    )
    key = Result.get_key(job_id)  # type: ignore[no-untyped-call]
    fields = (part for pair in result.serialize().items() for part in pair)
    return [("XADD", key, "MAXLEN", 10, "*", *fields), ("EXPIRE", key, keep)]


def worker_counted(worker_name: str, succeeded: bool) -> RqCommand:
    """One more job in a registered worker's counts."""
    field = "successful_job_count" if succeeded else "failed_job_count"
    return ("HINCRBY", f"{SimpleWorker.redis_worker_namespace_prefix}{worker_name}", field, 1)


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
        self._worker.connection.delete(self._worker.key)  # what was written to a forgotten worker: RQ would refuse
        self._worker.register_birth()  # type: ignore[no-untyped-call]
        self._busy = None
        self.beat(busy=False)

    @property
    def known(self) -> bool:
        """False before birth, and where Redis forgot the worker: it was away for too long, or lost its data."""
        return bool(self._worker.connection.hexists(self._worker.key, "birth"))

    def beat(self, busy: bool) -> None:
        if busy != self._busy:
            self._worker.set_state(WorkerStatus.BUSY if busy else WorkerStatus.IDLE)
            self._busy = busy
        self._worker.heartbeat()

    def death(self) -> None:
        self._worker.register_death()  # type: ignore[no-untyped-call]
