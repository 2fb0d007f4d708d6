"""One reader per gateway process: many followers of many jobs share one blocking Redis connection."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any, Final
from uuid import uuid4

from redis.asyncio import Redis as AsyncRedis

from broker import rq_surface
from broker.connection import REDIS_UNAVAILABLE, text
from broker.events import MAX_EVENTS, START, StreamedEvent, event_order, parse_entry
from broker.refusals import LUA_EVEN_IF_FULL
from contract import keys
from contract.spec import JobStatus

_BLOCK_MS: Final = 5000
_GATHER_SECONDS: Final = 0.01
_RETRY_SECONDS: Final = 0.5
_WAKE_SECONDS: Final = 60

# KEYS: a hub's own stream; ARGV: job, seconds.
_WAKE: Final = (
    LUA_EVEN_IF_FULL
    + """
redis.call('XADD', KEYS[1], 'MAXLEN', 1, '*', 'job', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
)

# An exception tells a follower that Redis went away while it waited.
Mailbox = asyncio.Queue[StreamedEvent | Exception]


class Hub:
    """Start it in the gateway's event loop, close it at the end; `follow` in between."""

    def __init__(self, connection: AsyncRedis) -> None:
        self._redis = connection
        self._mailboxes: dict[str, set[Mailbox]] = defaultdict(set)
        self._positions: dict[str, str] = {}
        self._wake = f"darkroom:hub:{uuid4().hex}"
        self._reader: asyncio.Task[None] | None = None

    @property
    def followers(self) -> int:
        return sum(len(boxes) for boxes in self._mailboxes.values())

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader

    async def follow(self, job_id: str, after: str = START) -> AsyncGenerator[StreamedEvent, None]:
        """The job's events behind id `after`, past ones first, until its terminal event; each exactly once, in order.

        Ends without a terminal event when the job has ended and its events are no longer kept. Raises ValueError for an
        `after` that is no event id, and what redis raises when Redis goes away.
        """
        seen = event_order(after)
        mailbox: Mailbox = asyncio.Queue(maxsize=2 * MAX_EVENTS)
        self._mailboxes[job_id].add(mailbox)
        try:
            past = await self._past(job_id, after)
            if not (past and past[-1].terminal) and await self._ended(job_id):
                past = await self._past(job_id, after)  # it may have ended since the first look
                if not (past and past[-1].terminal):
                    for event in past:
                        yield event
                    return
            for event in past:
                yield event
                seen = event_order(event.id)
                if event.terminal:
                    return
            await self._read_from(job_id, past[-1].id if past else after)
            while True:
                item = await mailbox.get()
                if isinstance(item, Exception):
                    raise item
                if event_order(item.id) <= seen:
                    continue
                seen = event_order(item.id)
                yield item
                if item.terminal:
                    return
        finally:
            self._leave(job_id, mailbox)

    async def _past(self, job_id: str, after: str) -> list[StreamedEvent]:
        entries = await self._redis.xrange(keys.events(job_id), min=f"({after}", max="+")
        return [parse_entry(entry) for entry in entries or ()]

    async def _ended(self, job_id: str) -> bool:
        status = await self._redis.hget(rq_surface.job_key(job_id), "status")
        return status is None or rq_surface.STATUS.get(text(status), JobStatus.FAILED).ended

    async def _read_from(self, job_id: str, position: str) -> None:
        """Makes sure that the reader reads the job's stream, at `position` or earlier."""
        if job_id in self._positions:
            return
        self._positions[job_id] = position
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read(), name="darkroom-events-hub")
        else:
            await self._redis.eval(_WAKE, 1, self._wake, job_id, _WAKE_SECONDS)

    def _leave(self, job_id: str, mailbox: Mailbox) -> None:
        self._mailboxes[job_id].discard(mailbox)
        if not self._mailboxes[job_id]:
            del self._mailboxes[job_id]
            self._positions.pop(job_id, None)

    async def _read(self) -> None:
        """Reads all followed streams and the wake-up stream (a new follower cuts the blocking read short)."""
        wake_position = START
        while self._positions:
            streams = {self._wake: wake_position} | {keys.events(job): at for job, at in self._positions.items()}
            jobs = {keys.events(job): job for job in self._positions}
            try:
                answer: Any = await self._redis.xread(streams, block=_BLOCK_MS)  # type: ignore[arg-type]
            except REDIS_UNAVAILABLE as error:
                self._tell_all(error)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            for name, entries in answer or ():
                if text(name) == self._wake:
                    wake_position = text(entries[-1][0])
                else:
                    self._deliver(jobs[text(name)], entries)
            await asyncio.sleep(_GATHER_SECONDS)  # one read then brings the events of many jobs

    def _deliver(self, job_id: str, entries: list[Any]) -> None:
        if job_id in self._positions:
            self._positions[job_id] = text(entries[-1][0])
        try:
            items: list[StreamedEvent | Exception] = [parse_entry(entry) for entry in entries]
        except ValueError as error:  # written by a newer version: only this job's followers fail
            items = [error]
        for mailbox in self._mailboxes.get(job_id, ()):
            for item in items:
                if mailbox.full():  # a client that stopped reading: its oldest events go
                    mailbox.get_nowait()
                mailbox.put_nowait(item)

    def _tell_all(self, error: Exception) -> None:
        for boxes in self._mailboxes.values():
            for mailbox in boxes:
                if not mailbox.full():
                    mailbox.put_nowait(error)
