"""Reading jobs: RQ's hash says the status, ours the rest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import TypeAdapter
from redis.asyncio import Redis as AsyncRedis

from broker import rq_surface
from broker.connection import text
from broker.events import Progress
from broker.state import LUA_STORED, Stored, stored, stored_keys
from contract import keys
from contract.spec import JobError, JobResult, JobSpec, JobStatus, JobWarning, Priority

_WARNINGS: Final = TypeAdapter(tuple[JobWarning, ...])
_SCAN: Final = 100
_MAX_SCANNED: Final = 2000


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it stands. Times are Unix seconds by Redis' clock.

    `queue_position` counts the older jobs ahead, while queued (0 = next); turns between API keys may serve it sooner or
    later. `step` of `steps` denoising steps are done; before the worker's first report `steps` is what was asked.
    `result` is there exactly when succeeded, `error` when failed.
    """

    spec: JobSpec
    status: JobStatus
    created_at: float
    started_at: float | None
    finished_at: float | None
    queue_position: int | None
    step: int
    steps: int
    warnings: tuple[JobWarning, ...]
    result: JobResult | None
    error: JobError | None


@dataclass(frozen=True, slots=True)
class JobPage:
    """Newest first; `cursor` continues the listing, None at its end."""

    jobs: tuple[JobRecord, ...]
    cursor: str | None


class InvalidCursorError(ValueError):
    """The cursor was not made by `list_jobs`."""


async def read_job(connection: AsyncRedis, job_id: str) -> JobRecord | None:
    return (await read_jobs(connection, [job_id]))[0]


async def read_jobs(connection: AsyncRedis, job_ids: Sequence[str]) -> list[JobRecord | None]:
    """One record per id; None where there is no job (or none that this version can read)."""
    names = stored_keys(job_ids)
    answers: Any = await connection.eval(LUA_STORED, len(names), *names)
    records = [_record(stored(answer)) for answer in answers]
    return [await _with_position(connection, record) for record in records]


def _record(job: Stored) -> JobRecord | None:
    ours, status = job.ours, rq_surface.STATUS.get(text(job.status)) if job.status else None
    if status is None or job.data is None or b"created_at" not in ours:
        return None
    try:
        spec = rq_surface.stored_spec(job.data)
        result = JobResult.from_json(ours[b"result"]) if b"result" in ours else None
        error = JobError.model_validate_json(ours[b"error"], extra="ignore") if b"error" in ours else None
        warnings = result.warnings if result else _WARNINGS.validate_json(ours.get(b"warnings", b"[]"), extra="ignore")
    except ValueError:
        return None
    step, steps = _steps(job.progress, spec, status)
    return JobRecord(
        spec=spec,
        status=status,
        created_at=float(ours[b"created_at"]),
        started_at=_seconds(ours, b"started_at"),
        finished_at=_seconds(ours, b"finished_at"),
        queue_position=None,
        step=step,
        steps=steps,
        warnings=warnings,
        result=result,
        error=error,
    )


def _seconds(ours: dict[bytes, bytes], field: bytes) -> float | None:
    return float(ours[field]) if field in ours else None


def _steps(progress: bytes | None, spec: JobSpec, status: JobStatus) -> tuple[int, int]:
    if progress:
        running = Progress.parse(progress)
        return running.step, running.steps
    return (spec.steps if status is JobStatus.SUCCEEDED else 0), spec.steps


async def _with_position(connection: AsyncRedis, record: JobRecord | None) -> JobRecord | None:
    """Queues are taken in the order of priority, so whole earlier queues count as ahead."""
    if record is None or record.status is not JobStatus.QUEUED:
        return record
    spec, ahead = record.spec, 0
    for priority in Priority:
        queue = rq_surface.queue_key(keys.queue_name(spec.model, priority))
        if priority is spec.priority:
            place: Any = await connection.lpos(queue, spec.id)
            ahead += int(place or 0)
            break
        ahead += await connection.llen(queue)
    return replace(record, queue_position=ahead)


async def list_jobs(
    connection: AsyncRedis,
    index: str,
    status: JobStatus | None = None,
    limit: int = 20,
    cursor: str | None = None,
) -> JobPage:
    """The jobs of `index`, `keys.jobs_of` one API key or `keys.all_jobs`, newest first. Raises `InvalidCursorError`.

    With a `status`, a page may hold fewer than `limit` jobs and still have a cursor: a call looks at only so many.
    """
    score, last = _parse_cursor(cursor)
    found: list[JobRecord] = []
    scanned = 0
    while scanned < _MAX_SCANNED:
        batch = await _batch_before(connection, index, score, last)
        for (job_id, at), record in zip(
            batch, await read_jobs(connection, [job_id for job_id, _ in batch]), strict=True
        ):
            score, last, scanned = at, job_id, scanned + 1
            if record is None:
                if not await connection.exists(rq_surface.job_key(job_id)):  # else a newer version's
                    await connection.zrem(index, job_id)
            elif status is None or record.status is status:
                found.append(record)
                if len(found) == limit:
                    return JobPage(tuple(found), f"{score}~{last}")
        if len(batch) < _SCAN:
            return JobPage(tuple(found), None)
    return JobPage(tuple(found), f"{score}~{last}")


def _parse_cursor(cursor: str | None) -> tuple[int | None, str]:
    if cursor is None:
        return None, ""
    score, separator, last = cursor.partition("~")
    if not (separator and score.isascii() and score.isdigit()):
        raise InvalidCursorError(
            f"cursor {cursor!r} was not made by this server; leave it out to begin at the newest job"
        )
    return int(score), last


async def _batch_before(connection: AsyncRedis, key: str, score: int | None, last: str) -> list[tuple[str, int]]:
    """Up to `_SCAN` (id, microseconds) after (score, last) in descending order; ids break ties of the score."""
    highest = "+inf" if score is None else score
    batch: Any = await connection.zrevrangebyscore(key, highest, "-inf", start=0, num=_SCAN + 1, withscores=True)
    pairs = [(text(job_id), int(at)) for job_id, at in batch]
    return [(job_id, at) for job_id, at in pairs if score is None or at < score or job_id < last][:_SCAN]
