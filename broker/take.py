"""How a worker gets jobs: move ids out of the queues in one script, then admit them in one transaction.

Between the two steps an id lies in RQ's intermediate list under a lease of its own, so that a worker that dies there
loses nothing: `reap` puts the id back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from uuid import uuid4

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError
from redis.typing import EncodableT, FieldT
from rq.job import Job

from broker import resume, rq_surface
from broker.connection import text
from broker.events import add_event
from contract import keys
from contract.events import StartedEvent
from contract.spec import JobSpec, JobStatus

_TAKEN: Final = "take"

# KEYS: leases, then (queue, intermediate) pairs in the order of taking. Returns (pair number, id) alternating.
_TAKE: Final = """
local clock = redis.call('TIME')
local lease = clock[1] + clock[2] / 1000000 + tonumber(ARGV[2])
local left, taken = tonumber(ARGV[1]), {}
for i = 2, #KEYS, 2 do
  while left > 0 do
    local id = redis.call('LMOVE', KEYS[i], KEYS[i + 1], 'LEFT', 'RIGHT')
    if not id then break end
    redis.call('ZADD', KEYS[1], string.format('%.6f', lease), id .. ':' .. ARGV[3])
    taken[#taken + 1] = i / 2
    taken[#taken + 1] = id
    left = left - 1
  end
end
return taken
"""


def taken_by(execution_id: str) -> str | None:
    """The worker's name, where a lease is of a job that is taken and not yet admitted; else None."""
    kind, _, rest = execution_id.partition(":")
    return rest.rpartition(":")[0] if kind == _TAKEN else None


@dataclass(frozen=True, slots=True, eq=False)
class TakenJob:
    """A job that this worker holds: `execution_id` is the fence, `queued_seconds` how long it has waited in all.

    `resume` has what an earlier execution saved, by picture index (absent: from the beginning).
    """

    spec: JobSpec
    execution_id: str
    queued_seconds: float
    resume: Mapping[int, bytes] = field(default_factory=dict, repr=False)

    @property
    def job_id(self) -> str:
        return self.spec.id


@dataclass(frozen=True, slots=True)
class UnreadableJob:
    """An admitted job whose spec this worker cannot read; to be failed."""

    job_id: str
    execution_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Own:
    """What our own keys know of a job that is being admitted."""

    created_at: float
    resume: Mapping[int, bytes]


class Taker:
    """Takes from the given RQ queues, in their order."""

    def __init__(self, connection: Redis, worker_name: str, queues: list[str], lease_seconds: float) -> None:
        self._connection = connection
        self._script = connection.register_script(_TAKE)
        self._worker_name = worker_name
        self._queues = queues
        self._lease_seconds = lease_seconds

    def take(self, slots: int) -> list[TakenJob | UnreadableJob]:
        """Up to `slots` jobs, admitted: started in RQ, leased, with their started events written."""
        token = f"{_TAKEN}:{self._worker_name}:{uuid4().hex}"
        lists = [name(queue) for queue in self._queues for name in (rq_surface.queue_key, rq_surface.intermediate_key)]
        answer = self._script(keys=[keys.leases(), *lists], args=[slots, self._lease_seconds, token])
        taken = {text(answer[i + 1]): self._queues[int(answer[i]) - 1] for i in range(0, len(answer), 2)}
        return self._admit(taken, token) if taken else []

    def _admit(self, taken: dict[str, str], token: str) -> list[TakenJob | UnreadableJob]:
        """Starts those of `taken` (id to queue, no duplicates) that are still queued; drops the rest."""
        ids = list(taken)
        with self._connection.pipeline() as pipeline:
            while True:
                try:
                    pipeline.watch(*map(rq_surface.job_key, ids))  # type: ignore[no-untyped-call]
                    jobs = rq_surface.fetch_many(ids, self._connection)
                    own, now = self._read(ids)
                    pipeline.multi()
                    admitted: list[TakenJob | UnreadableJob] = []
                    for job_id, job in zip(ids, jobs, strict=True):
                        pipeline.lrem(rq_surface.intermediate_key(taken[job_id]), 0, job_id)
                        pipeline.zrem(keys.leases(), f"{job_id}:{token}")
                        if job is not None and rq_surface.status_of(job) is JobStatus.QUEUED:
                            admitted.append(self._start(job, now, own[job_id], pipeline))
                    pipeline.execute()
                    return admitted
                except WatchError:
                    continue

    def _read(self, ids: list[str]) -> tuple[dict[str, _Own], float]:
        """Our part of each job, and Redis' time."""
        reads = self._connection.pipeline(transaction=False)
        for job_id in ids:
            reads.hget(keys.job(job_id), "created_at")
            reads.hgetall(keys.resume(job_id))
        reads.time()
        *answers, (seconds, microseconds) = reads.execute()
        now = seconds + microseconds / 1e6
        pairs = zip(ids, answers[::2], answers[1::2], strict=True)
        return {job_id: _Own(float(since or now), resume.parse(saved)) for job_id, since, saved in pairs}, now

    def _start(self, job: Job, now: float, own: _Own, pipeline: Pipeline) -> TakenJob | UnreadableJob:
        execution_id = rq_surface.start(job, self._worker_name, pipeline)
        pipeline.zadd(keys.leases(), {f"{job.id}:{execution_id}": now + self._lease_seconds})
        fields: dict[FieldT, EncodableT] = {
            "execution": execution_id,
            "started_at": f"{now:.6f}",
            "worker": self._worker_name,
        }
        pipeline.hset(keys.job(job.id), mapping=fields)
        add_event(job.id, StartedEvent(execution_id=execution_id, worker=self._worker_name), pipeline)
        try:
            spec = rq_surface.job_spec(job)
        except ValueError as error:
            return UnreadableJob(job.id, execution_id, str(error))
        if spec.deadline_seconds is None:
            pipeline.zrem(keys.deadlines(), job.id)
        return TakenJob(spec, execution_id, max(0.0, now - own.created_at), own.resume)
