"""Jobs: list, look at, follow, cancel, delete."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from broker.api_keys import Scope
from broker.jobs import InvalidCursorError
from contract.errors import ErrorCode
from contract.spec import JobStatus
from service.auth import Reader, Submitter, require
from service.jobs_view import JobList, JobView, view_job
from service.problems import FieldError, ProblemError
from service.routes.common import ChangeableJob, JobId, State, VisibleJob, find_job, job_not_found, problems
from service.sse import EVENT_ID_PATTERN, EventsStart, stream_events

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EVERY_KEY: Final = "all"
_KEY: Final = r"^[A-Za-z0-9._-]{1,100}$"
_KEY_DESCRIPTION: Final = "with the scope `admin`: id of the key whose jobs to list, or `all`"
_CURSOR: Final = r"^[0-9]{1,18}~[A-Za-z0-9_-]{1,100}$"
LastEventId = Annotated[
    str | None,
    Header(pattern=EVENT_ID_PATTERN, description="id of the last event that came through; a reconnect sends it"),
]


@router.get("", responses=problems(ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN, ErrorCode.VALIDATION_FAILED))
async def list_jobs(
    request: Request,
    state: State,
    caller: Reader,
    status: Annotated[JobStatus | None, Query(description="only jobs in this state", examples=["succeeded"])] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="most jobs of one page", examples=[20])] = 20,
    cursor: Annotated[str | None, Query(pattern=_CURSOR, description="`next_cursor` of the page before")] = None,
    key: Annotated[str | None, Query(pattern=_KEY, description=_KEY_DESCRIPTION)] = None,
) -> JobList:
    """The jobs of your API key, newest first. With `status`, a page may be short and still not be the last."""
    if key not in (None, caller.key_id):
        require(caller, Scope.ADMIN)
    try:
        if key == EVERY_KEY:
            page = await state.broker.list_all_jobs(status, limit, cursor)
        else:
            page = await state.broker.list_jobs(key or caller.key_id, status, limit, cursor)
    except InvalidCursorError as error:
        raise ProblemError(
            ErrorCode.VALIDATION_FAILED, str(error), [FieldError(parameter="cursor", detail=str(error))]
        ) from error
    return JobList(data=[await view_job(record, request) for record in page.jobs], next_cursor=page.cursor)


@router.get("/{job_id}", responses=problems(ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN, ErrorCode.JOB_NOT_FOUND))
async def get_job(request: Request, job: VisibleJob) -> JobView:
    """One job. Its pictures' URLs are signed anew with every answer."""
    return await view_job(job, request)


@router.delete(
    "/{job_id}",
    status_code=204,
    responses=problems(ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN, ErrorCode.JOB_NOT_FOUND, ErrorCode.JOB_NOT_ENDED),
)
async def delete_job(job: ChangeableJob, state: State) -> Response:
    """Removes an ended job with its pictures. Cancel a job that has not ended first."""
    found = await state.broker.delete(job.spec.id)
    if found is None:
        raise job_not_found(job.spec.id)
    if not found.ended:
        detail = f"the job is {found.value}; cancel it, wait until it has ended, then delete it"
        raise ProblemError(ErrorCode.JOB_NOT_ENDED, detail)
    return Response(status_code=204)


@router.post(
    "/{job_id}/cancel",
    status_code=200,
    responses={
        202: {"model": JobView, "description": "It runs; its worker stops it at the next step"},
        **problems(ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN, ErrorCode.JOB_NOT_FOUND, ErrorCode.JOB_ENDED),
    },
)
async def cancel_job(request: Request, response: Response, job_id: JobId, state: State, caller: Submitter) -> JobView:
    """Stops a job: at once while it waits, at its next step while it runs. Cancelling twice is no error."""
    job = await find_job(state, job_id, caller)
    status = await state.broker.cancel(job.spec.id)
    if status is None:
        raise job_not_found(job_id)
    if status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise ProblemError(ErrorCode.JOB_ENDED, f"the job has already {status.value}; there is nothing to cancel")
    if status is JobStatus.RUNNING:
        response.status_code = 202
    return await view_job(await find_job(state, job_id, caller), request)


async def events_start(job_id: JobId, state: State, caller: Reader, last_event_id: LastEventId = None) -> EventsStart:
    """Everything that can be refused is refused here, before the stream begins."""
    # The position is read before the job: what happens in between comes twice rather than never.
    position = last_event_id or await state.broker.last_event_id(job_id)
    return EventsStart(await find_job(state, job_id, caller), position, fresh=last_event_id is None)


@router.get(
    "/{job_id}/events",
    response_class=EventSourceResponse,
    responses=problems(
        ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN, ErrorCode.JOB_NOT_FOUND, ErrorCode.VALIDATION_FAILED
    ),
)
async def follow_job(
    request: Request, state: State, caller: Reader, start: Annotated[EventsStart, Depends(events_start)]
) -> AsyncGenerator[ServerSentEvent, None]:
    """Server-sent events until the job has ended: queued, started, progress, preview, succeeded, failed, cancelled.

    The first event tells how the job stands; its data, and that of the last event, is the whole job. A reconnect with
    `Last-Event-ID` goes on where it broke off. Previews carry a small picture as base64.
    """
    async with aclosing(stream_events(request, start)) as events:
        async for event in events:
            if not await state.api_keys.accepts(caller):  # revoked meanwhile
                return
            yield event
