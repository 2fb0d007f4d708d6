"""Retention: what a job leaves behind goes when its time is over. Runs in gateways and workers; one at a time works.

It deletes the pictures of jobs in every kind of store. What belongs to no job it looks for among the inputs of every
store and the outputs of a local one; among the outputs of a cloud store, which may be many, a lifecycle rule does.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis

from broker import rq_surface
from broker.connection import redis_time, text
from broker.refusals import LUA_EVEN_IF_FULL
from broker.store import Store, StoreError
from contract import keys
from contract.settings import Settings
from contract.spec import JobStatus

_MOST: Final = 10_000
_ORPHAN_SECONDS: Final = 3600

# KEYS: lock; ARGV: milliseconds.
_TURN: Final = (
    LUA_EVEN_IF_FULL
    + """
return redis.call('SET', KEYS[1], 'held', 'NX', 'PX', ARGV[1])
"""
)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """Jobs removed, jobs whose inputs went, pictures that belonged to no job, and jobs removed to keep the quota."""

    jobs: int = 0
    inputs: int = 0
    orphans: int = 0
    over_quota: int = 0


def delete_job(connection: Redis, store: Store, job_id: str) -> JobStatus | None:
    """Removes an ended job with its pictures, inputs and events.

    Returns the status that was found: queued and running jobs stay untouched; None: there is no such job. Pictures go
    first, so that a failing store leaves a job that can be deleted again.
    """
    fields = connection.hmget(rq_surface.job_key(job_id), ["status", "origin"])
    status = rq_surface.STATUS.get(text(fields[0])) if fields[0] else None
    if status is not None and not status.ended:
        return status
    owner = text(connection.hget(keys.job(job_id), "owner") or "")
    store.delete_folder(keys.outputs_of(job_id))
    store.delete_folder(keys.inputs_of(job_id))
    pipeline = connection.pipeline(transaction=False)  # a full Redis would refuse a transaction
    pipeline.zrem(keys.jobs_of(owner), job_id)
    if fields[1]:
        rq_surface.delete_ended(job_id, text(fields[1]), pipeline)
    pipeline.delete(keys.job(job_id), keys.events(job_id), keys.preview(job_id), keys.progress(job_id))
    pipeline.delete(keys.resume(job_id))
    pipeline.zrem(keys.all_jobs(), job_id)
    pipeline.zrem(keys.inputs_due(), job_id)
    pipeline.zrem(keys.ended(), job_id)  # the last: what is cut off before it is done again
    pipeline.execute()
    return status


class Janitor:
    """Call `clean` every `janitor_seconds`; it does nothing while another process has had its turn."""

    def __init__(self, connection: Redis, store: Store, settings: Settings) -> None:
        self._connection = connection
        self._store = store
        self._settings = settings
        self._failure: StoreError | None = None

    def clean(self) -> Cleaned:
        """Raises what redis raises, and `StoreError` once the rest is done; what was not is due again."""
        if not self._turn("janitor", self._settings.janitor_seconds):
            return Cleaned()
        self._failure = None
        now, stop = redis_time(self._connection), time.monotonic() + self._settings.janitor_seconds
        inputs = self._each(self._forget_inputs, self._due(keys.inputs_due(), now, stop))
        old = self._due(keys.ended(), now - self._settings.retention_seconds, stop)
        jobs = self._each(self._delete, old)
        orphans = self._clean_orphans(now) if self._turn("orphans", _ORPHAN_SECONDS) else 0
        cleaned = Cleaned(jobs, inputs, orphans, self._keep_quota())
        if self._failure is not None:
            raise self._failure
        return cleaned

    def _each(self, clean: Callable[[str], object], jobs: Iterable[str]) -> int:
        """How many it was done for. One that the store refuses must not keep the janitor from all others for ever."""
        done = 0
        for job_id in jobs:
            try:
                clean(job_id)
                done += 1
            except StoreError as error:
                self._failure = error
        return done

    def _delete(self, job_id: str) -> None:
        delete_job(self._connection, self._store, job_id)

    def _forget_inputs(self, job_id: str) -> None:
        self._store.delete_folder(keys.inputs_of(job_id))
        self._connection.zrem(keys.inputs_due(), job_id)

    def _turn(self, name: str, seconds: float) -> bool:
        """One process per period; never released, so the period holds across processes."""
        milliseconds = max(1, int(seconds * 900))  # a little short of the period, or every second turn would be missed
        return bool(self._connection.eval(_TURN, 1, keys.lock(name), milliseconds))

    def _due(self, key: str, until: float, stop: float) -> Iterator[str]:
        """Jobs by score up to `until`; at least one, and none after `stop` on this machine's monotonic clock."""
        due: Any = self._connection.zrangebyscore(key, "-inf", until, start=0, num=_MOST)
        for job_id in due:
            yield text(job_id)
            if time.monotonic() > stop:
                return

    def _keep_quota(self) -> int:
        """Removes whole jobs, the longest ended first, until a local store is within its quota."""
        quota = self._settings.store_quota_bytes
        if quota is None or self._store.folder is None:
            return 0
        sizes: Counter[str] = Counter()
        for folder in ("inputs/", "outputs/"):
            for entry in self._store.list(folder):
                sizes[_job_of(entry.key)] += entry.size
        excess, removed = sizes.total() - quota, 0
        ended: Any = self._connection.zrange(keys.ended(), 0, -1) if excess > 0 else []
        for job_id in map(text, ended):
            if excess > 0 and sizes[job_id] and self._each(self._delete, [job_id]):
                excess -= sizes[job_id]
                removed += 1
        return removed

    def _clean_orphans(self, now: float) -> int:
        """Inputs of jobs that were then refused, or whose gateway died before it submitted, and probes of processes
        that died at their start; in a local store also what killed writers and workers without a job have left."""
        found = self._store.delete_torn(now - _ORPHAN_SECONDS)
        for folder in ("inputs/", "checks/"):
            found += self._clean_without_job(folder, now - _ORPHAN_SECONDS)
        if self._store.folder is not None:
            found += self._clean_without_job("outputs/", now - self._settings.retention_seconds - _ORPHAN_SECONDS)
        return found

    def _clean_without_job(self, folder: str, before: float) -> int:
        found = 0
        for job_id in {_job_of(entry.key) for entry in self._store.list(folder) if entry.modified < before}:
            if not self._connection.exists(rq_surface.job_key(job_id)):
                found += self._store.delete_folder(f"{folder}{job_id}/")
        return found


def _job_of(key: str) -> str:
    """Of an input or output picture; of a probe, what no job is called."""
    return key.split("/")[1]
