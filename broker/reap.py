"""The sweep: abandoned jobs go back, expired ones fail. Every gateway and worker runs it; fences let them overlap."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis

from broker import catalogue
from broker.connection import REDIS_UNAVAILABLE, redis_time, text
from broker.finish import Finisher
from broker.state import read_state
from broker.stops import Stop
from contract import keys
from contract.errors import ErrorCode
from contract.events import FailedEvent
from contract.settings import Settings
from contract.spec import JobError, JobStatus

_BATCH: Final = 100
_EXPIRED: Final = FailedEvent(
    error=JobError(
        code=ErrorCode.EXPIRED,
        detail="no worker took the job before its deadline; ask for a later one or try again when the queue is shorter",
    )
)


@dataclass(frozen=True, slots=True)
class Swept:
    """How many jobs one sweep put back into their queues, and how many it ended."""

    returned: int = 0
    failed: int = 0


class Sweeper:
    """Finds lapsed leases and passed deadlines by Redis' clock."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._finisher = Finisher(connection, settings)
        self._reachable_since = math.inf
        self._offset = math.inf

    def sweep(self) -> Swept:
        """Raises what redis raises. Reaps nobody before Redis has answered for one whole lease: after an outage the
        workers come first, and after a step of Redis' clock, since another primary has another clock."""
        try:
            now = self._now()
            expired = self._expire(now)
            if time.monotonic() - self._reachable_since < self._settings.lease_seconds:
                return Swept(failed=expired)
            lapsed: Any = self._connection.zrangebyscore(keys.leases(), "-inf", now, start=0, num=_BATCH)
            reaped = self._abandon(text(member) for member in lapsed)
            return Swept(reaped.returned, expired + reaped.failed)
        except REDIS_UNAVAILABLE:
            self._reachable_since = math.inf
            raise

    def _now(self) -> float:
        asked = time.monotonic()
        now = redis_time(self._connection)
        answered = time.monotonic()
        ahead = now - answered - self._offset  # a slow answer makes it smaller, never larger
        if self._reachable_since == math.inf or ahead > self._settings.lease_seconds / 2:
            self._reachable_since = answered
        self._offset = now - asked
        return now

    def reap_worker(self, name: str) -> Swept:
        """Abandons at once all that a dead worker held, also what it never learned it had; forgets its name."""
        leases: Any = self._connection.zrange(keys.leases(), 0, -1)
        members = [text(member) for member in leases]
        reads = self._connection.pipeline(transaction=False)
        for member in members:
            reads.hget(keys.job(_parted(member)[0]), "worker")
        holders = [text(holder or "") for holder in reads.execute()]
        swept = self._abandon(member for member, holder in zip(members, holders, strict=True) if holder == name)
        catalogue.remove_worker(self._connection, name)
        return swept

    def _abandon(self, members: Iterable[str]) -> Swept:
        returned = ended = 0
        for member in members:
            match self._finisher.abandon(*_parted(member)):
                case "returned":
                    returned += 1
                case "ended":
                    ended += 1
                case "gone":
                    self._connection.zrem(keys.leases(), member)
        return Swept(returned, ended)

    def _expire(self, now: float) -> int:
        """Waiting jobs past their deadline fail here; a running one is flagged and its worker ends it."""
        failed = 0
        due: Any = self._connection.zrangebyscore(keys.deadlines(), "-inf", now, start=0, num=_BATCH)
        for job_id in map(text, due):
            state = read_state(self._connection, job_id)
            if state is not None and state.status is JobStatus.QUEUED:
                failed += self._finisher.end(state.ref, None, _EXPIRED)  # else it was taken: the next sweep flags it
            elif state is None or state.status is not JobStatus.RUNNING or self._finisher.flag(job_id, Stop.DEADLINE):
                self._connection.zrem(keys.deadlines(), job_id)
        return failed


def _parted(member: str) -> tuple[str, str]:
    job_id, _, execution_id = member.partition(":")
    return job_id, execution_id
