"""The four tasks: a request becomes a job, answered at once or, with `Prefer: wait`, when it has ended."""

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from fastapi import APIRouter, Request, Response

from broker.jobs import JobRecord
from broker.submit import Submitted
from contract.errors import ErrorCode
from contract.spec import Task
from service import quotas
from service.auth import Submitter, check_still_accepted
from service.auth_keys import Caller
from service.jobs_view import JobView, view_job
from service.openapi import request_body
from service.parameters import DOCUMENTED, Parameters
from service.problems import REQUEST_ID_SCOPE_KEY
from service.routes.common import find_job, problems
from service.schemas import REQUESTS
from service.state import GatewayState
from service.submission import submit
from service.waiting import seconds_to_wait, wait_for_end

router = APIRouter(prefix="/v1", tags=["pictures"])
_SUMMARIES: Final = {
    Task.TXT2IMG: "Make pictures from words",
    Task.IMG2IMG: "Repaint a picture",
    Task.INPAINT: "Repaint part of a picture",
    Task.UPSCALE: "Enlarge a picture",
}
_REFUSALS: Final = (
    ErrorCode.INVALID_JSON,
    ErrorCode.INVALID_MULTIPART,
    ErrorCode.UNAUTHORIZED,
    ErrorCode.FORBIDDEN,
    ErrorCode.MODEL_NOT_FOUND,
    ErrorCode.REQUEST_TIMEOUT,
    ErrorCode.BODY_TOO_LARGE,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE,
    ErrorCode.VALIDATION_FAILED,
    ErrorCode.IMAGE_INVALID,
    ErrorCode.IMAGE_TOO_LARGE,
    ErrorCode.IDEMPOTENCY_CONFLICT,
    ErrorCode.IDEMPOTENCY_MISMATCH,
    ErrorCode.RATE_LIMITED,
    ErrorCode.UPLOADS_BUSY,
    ErrorCode.QUEUE_FULL,
    ErrorCode.STORE_UNAVAILABLE,
)


def _endpoint(task: Task) -> Callable[..., Awaitable[JobView]]:
    async def generate(request: Request, response: Response, caller: Submitter) -> JobView:
        state, parameters = GatewayState.of(request), Parameters.of(request)
        submitted = await _queue(request, state, task, caller, parameters.idempotency_key)
        structlog.contextvars.bind_contextvars(job=submitted.job_id)
        if submitted.quota is not None:
            response.headers.update(quotas.fields_of(submitted.quota))
        seconds = seconds_to_wait(parameters.prefer, state.settings.max_wait_seconds)
        if seconds is not None:
            await wait_for_end(request, state, submitted.job_id, seconds, parameters.cancel_on_disconnect)
            await check_still_accepted(caller, state)
            response.headers["Preference-Applied"] = f"wait={seconds:g}"
        job = submitted.record if seconds is None else None
        return await _answer(
            request, response, job or await find_job(state, submitted.job_id, caller), waited=seconds is not None
        )

    generate.__doc__ = REQUESTS[task].__doc__
    generate.__name__ = task.value
    return generate


async def _queue(
    request: Request, state: GatewayState, task: Task, caller: Caller, idempotency_key: str | None
) -> Submitted:
    """Apart, so that nothing holds the body while its client waits for the job."""
    with state.bodies.share(caller.key_id) as share:
        asked = await share.read(request, REQUESTS[task])
        return await submit(state, task, asked, caller.key_id, idempotency_key, request.scope[REQUEST_ID_SCOPE_KEY])


async def _answer(request: Request, response: Response, job: JobRecord, waited: bool) -> JobView:
    view = await view_job(job, request)
    response.status_code = 200 if waited and job.status.ended else 202
    response.headers["Location"] = view.urls.self
    return view


for _task in Task:
    router.add_api_route(
        f"/{_task.value}",
        _endpoint(_task),
        methods=["POST"],
        status_code=202,
        summary=_SUMMARIES[_task],
        response_description="The job has been queued; follow it under `urls`",
        responses={
            200: {
                "model": JobView,
                "description": "With `Prefer: wait`: the job, ended",
                "headers": quotas.HEADERS,
            },
            202: {"headers": quotas.HEADERS},
            **problems(*_REFUSALS),
        },
        openapi_extra={"parameters": DOCUMENTED, **request_body(_task)},
    )
