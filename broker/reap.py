"""The sweep: abandoned jobs go back, expired ones fail. Every gateway and worker runs it; fences let them overlap."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from redis import Redis
from redis.client import Pipeline

from broker import catalogue, rq_surface
from broker.connection import REDIS_UNAVAILABLE, redis_time, text
from broker.finish import Finisher, Holding, transact
from broker.stops import Stop
from broker.take import taken_by
from contract import keys
from contract.errors import ErrorCode
from contract.events import FailedEvent
from contract.settings import Settings
from contract.spec import JobError, JobStatus

# A taken id whose worker died before admitting it: back to the head of its queue, unless the job has gone on meanwhile.
_RETURN_TAKEN: Final = """
local leases, intermediate, queue, job = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
if redis.call('ZREM', leases, ARGV[1]) == 0 then return 0 end
redis.call('LREM', intermediate, 1, ARGV[2])
if redis.call('HGET', job, 'status') ~= 'queued' then return 0 end
redis.call('LPUSH', queue, ARGV[2])
return 1
"""
_BATCH: Final = 100


@dataclass(frozen=True, slots=True)
class Swept:
    """How many jobs one sweep put back into their queues, and how many it failed."""

    returned: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class _Lease:
    job_id: str
    execution_id: str

    @classmethod
    def parse(cls, member: Any) -> Self:
        job_id, _, execution_id = text(member).partition(":")
        return cls(job_id, execution_id)


class Sweeper:
    """Finds lapsed leases and passed deadlines by Redis' clock."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._finisher = Finisher(connection, settings)
        self._return_taken = connection.register_script(_RETURN_TAKEN)
        self._reachable_since: float | None = None

    def sweep(self) -> Swept:
        """Raises what redis raises. Reaps nobody before Redis has answered for one whole lease: after an outage the
        workers come first."""
        try:
            now = redis_time(self._connection)
            if self._reachable_since is None:
                self._reachable_since = time.monotonic()
            expired = self._expire(now)
            if time.monotonic() - self._reachable_since < self._settings.lease_seconds:
                return Swept(failed=expired)
            reaped = self._reap(now)
            return Swept(reaped.returned, expired + reaped.failed)
        except REDIS_UNAVAILABLE:
            self._reachable_since = None
            raise

    def reap_worker(self, name: str) -> Swept:
        """Abandons at once all that a dead worker held, also what it had only taken; forgets its name."""
        leases = [_Lease.parse(member) for member in self._connection.zrange(keys.leases(), 0, -1)]
        reads = self._connection.pipeline(transaction=False)
        for lease in leases:
            reads.hmget(keys.job(lease.job_id), ["execution", "worker"])
        holders = [(text(execution or ""), text(worker or "")) for execution, worker in reads.execute()]
        swept = self._abandon_all(
            [
                lease
                for lease, holder in zip(leases, holders, strict=True)
                if taken_by(lease.execution_id) == name or holder == (lease.execution_id, name)
            ]
        )
        catalogue.remove_worker(self._connection, name)
        return swept

    def _reap(self, now: float) -> Swept:
        lapsed = self._connection.zrangebyscore(keys.leases(), "-inf", now, start=0, num=_BATCH)
        return self._abandon_all([_Lease.parse(member) for member in lapsed])

    def _abandon_all(self, leases: Sequence[_Lease]) -> Swept:
        returned = failed = 0
        for lease in leases:
            job_id, execution_id = lease.job_id, lease.execution_id
            if taken_by(execution_id) is not None:
                returned += self._take_back(job_id, execution_id)
            elif self._abandonments(job_id) >= self._settings.max_abandonments:
                failed += self._finisher.end(job_id, execution_id, _worker_lost(self._settings.max_abandonments + 1))
            elif self._finisher.requeue(job_id, execution_id, "abandoned"):
                returned += 1
            else:
                self._connection.zrem(keys.leases(), f"{job_id}:{execution_id}")  # of a job that went on
        return Swept(returned, failed)

    def _abandonments(self, job_id: str) -> int:
        return int(self._connection.hget(keys.job(job_id), "abandonments") or 0)

    def _take_back(self, job_id: str, token: str) -> int:
        origin = self._connection.hget(rq_surface.job_key(job_id), "origin")
        queue = text(origin) if origin else ""
        lists = [rq_surface.intermediate_key(queue), rq_surface.queue_key(queue)]
        names = [keys.leases(), *lists, rq_surface.job_key(job_id)]
        return int(self._return_taken(keys=names, args=[f"{job_id}:{token}", job_id]))

    def _expire(self, now: float) -> int:
        """Waiting jobs past their deadline fail here; a running one is flagged and its worker ends it."""
        failed = 0
        for member in self._connection.zrangebyscore(keys.deadlines(), "-inf", now, start=0, num=_BATCH):
            job_id = text(member)  # type: ignore[arg-type]
            if self._finisher.end(job_id, None, _EXPIRED):
                failed += 1
            else:
                transact(self._connection, job_id, flag_deadline)
                self._connection.zrem(keys.deadlines(), job_id)
        return failed


_EXPIRED: Final = FailedEvent(
    error=JobError(
        code=ErrorCode.EXPIRED,
        detail="no worker took the job before its deadline; ask for a later one or try again when the queue is shorter",
    )
)


def flag_deadline(holding: Holding, pipeline: Pipeline) -> None:
    pipeline.multi()
    if holding.status is JobStatus.RUNNING:
        pipeline.hset(keys.job(holding.job.id), "stop", Stop.DEADLINE)


def _worker_lost(times: int) -> FailedEvent:
    detail = f"{times} workers in a row died while running this job; it is not tried again"
    return FailedEvent(error=JobError(code=ErrorCode.WORKER_LOST, detail=detail))
