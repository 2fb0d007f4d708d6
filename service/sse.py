"""A job's events as server-sent events: what Last-Event-ID names is behind the client, a new client gets a snapshot.

Previews travel in the event as base64, read when the event is sent: only the latest one is kept, so that a client that
comes late sees fewer of them.
"""

import asyncio
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from fastapi import Request
from fastapi.sse import ServerSentEvent
from pydantic import BaseModel

from broker.connection import REDIS_UNAVAILABLE
from broker.events import StreamedEvent
from broker.gateway_side import JobBroker
from broker.jobs import JobRecord
from broker.store import StoreError
from contract.events import PreviewEvent, ProgressEvent, QueuedEvent, StartedEvent
from contract.spec import JobStatus
from service.jobs_view import view_job
from service.state import GatewayState

# Redis' stream ids: milliseconds and a number.
EVENT_ID_PATTERN: Final = r"^[0-9]{1,19}(-[0-9]{1,19})?$"
_RECONNECT_MS: Final = 1000
_NAME_OF_STATUS: Final = {JobStatus.QUEUED: "queued", JobStatus.RUNNING: "started"}


@dataclass(frozen=True, slots=True)
class EventsStart:
    """Where a client begins: `job` was read after the event `position` came to be. `fresh`: it knows nothing yet."""

    job: JobRecord
    position: str
    fresh: bool


async def stream_events(request: Request, start: EventsStart) -> AsyncGenerator[ServerSentEvent, None]:
    """Up to the terminal event. Ends early when Redis or the store goes away: clients come back by themselves."""
    state, job = GatewayState.of(request), start.job
    broker = state.broker
    try:
        if start.fresh:
            yield await snapshot(request, job, start.position)
            if job.status.ended:
                return
        async with aclosing(broker.follow(job.spec.id, start.position)) as events:
            while (streamed := await _next_unless(state.closing, events)) is not None:
                shown = await _public(request, broker, job.spec.id, streamed)
                if shown is not None:
                    yield shown
                if streamed.terminal:
                    return
        if state.closing.is_set():
            yield ServerSentEvent(comment="the server stops; reconnect", retry=_RECONNECT_MS)
            return
        latest = await broker.get(job.spec.id)
        if latest is not None and latest.status.ended:  # its events are no longer kept
            yield await snapshot(request, latest, None)
    except (*REDIS_UNAVAILABLE, StoreError):
        return


async def _next_unless(closing: asyncio.Event, events: AsyncGenerator[StreamedEvent, None]) -> StreamedEvent | None:
    """The next event; None at the end of the stream, or when the server stops."""
    coming = asyncio.ensure_future(anext(events, None))
    stopping = asyncio.create_task(closing.wait())
    try:
        await asyncio.wait((coming, stopping), return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        coming.cancel()
        stopping.cancel()
        await asyncio.gather(coming, stopping, return_exceptions=True)  # `events` is free again


async def snapshot(request: Request, record: JobRecord, event_id: str | None) -> ServerSentEvent:
    """The job as it stands, under the name of the event that brought it there."""
    name = _NAME_OF_STATUS.get(record.status, record.status.value)
    return ServerSentEvent(event=name, id=event_id, data=await view_job(record, request))


async def _public(request: Request, broker: JobBroker, job_id: str, streamed: StreamedEvent) -> ServerSentEvent | None:
    event = streamed.event
    data: dict[str, Any] | BaseModel
    match event:
        case QueuedEvent():
            data = {"status": JobStatus.QUEUED, "reason": event.reason}
        case StartedEvent():
            data = {"status": JobStatus.RUNNING}
        case ProgressEvent():
            data = {"status": JobStatus.RUNNING, "step": event.step, "steps": event.steps}
        case PreviewEvent():
            picture = await broker.preview(job_id)
            if picture is None:  # a newer state of the job has replaced it
                return None
            data = event.model_dump(exclude={"type"}) | {"image": b64encode(picture).decode()}
        case _:
            record = await broker.get(job_id)
            if record is None:  # deleted meanwhile
                return None
            data = await view_job(record, request)
    return ServerSentEvent(event=event.type, id=streamed.id, data=data)
