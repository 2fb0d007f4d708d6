"""What several routes need: the gateway's state, a job that the caller may see, and the documented problems."""

import re
from typing import Annotated, Any, Final

import structlog
from fastapi import Depends, Path, Request

from broker.jobs import JobRecord
from contract.errors import ErrorCode
from service.auth import Reader, Submitter
from service.auth_keys import Caller
from service.problems import COME_BACK, PROBLEM_TYPE, ProblemError, problem_of
from service.state import GatewayState


async def _state(request: Request) -> GatewayState:
    """A coroutine, since FastAPI sends plain functions through a thread."""
    return GatewayState.of(request)


State = Annotated[GatewayState, Depends(_state)]
JobId = Annotated[str, Path(description="the job's id", examples=["3f2a9c0e5b7d4c1e8a6f0d9b2c4e6a81"])]
_JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")

Responses = dict[int | str, dict[str, Any]]
_RETRY_AFTER: Final[dict[str, Any]] = {
    "description": "seconds after which to repeat the request",
    "required": True,
    "schema": {"type": "integer", "minimum": 1},
}


def problems(*codes: ErrorCode) -> Responses:
    """OpenAPI responses, one per status, with an example per code."""
    by_status: Responses = {}
    for code in (*codes, ErrorCode.INTERNAL, ErrorCode.BROKER_UNAVAILABLE):
        content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}}
        entry = by_status.setdefault(code.status, {"description": "", "content": content})
        entry["description"] = "; ".join(filter(None, (entry["description"], f"`{code.value}`: {code.summary}")))
        if code.status in COME_BACK:
            entry["headers"] = {"Retry-After": _RETRY_AFTER}
        example = problem_of(code).model_dump(mode="json", exclude_none=True)
        entry["content"][PROBLEM_TYPE]["examples"][code.value] = {"summary": code.summary, "value": example}
    return by_status


async def find_job(state: GatewayState, job_id: str, caller: Caller) -> JobRecord:
    """Raises the 404, also for a job of another key: whether it exists is nobody else's business."""
    record = await state.broker.get(job_id) if _JOB_ID.fullmatch(job_id) else None
    if record is None or not caller.sees(record.spec.api_key_id):
        raise job_not_found(job_id)
    structlog.contextvars.bind_contextvars(job=record.spec.id)
    return record


def job_not_found(job_id: str) -> ProblemError:
    return ProblemError(ErrorCode.JOB_NOT_FOUND, f"no job {job_id[:100]!r}; ended jobs are kept for a limited time")


async def visible_job(job_id: JobId, state: State, caller: Reader) -> JobRecord:
    return await find_job(state, job_id, caller)


async def changeable_job(job_id: JobId, state: State, caller: Submitter) -> JobRecord:
    return await find_job(state, job_id, caller)


VisibleJob = Annotated[JobRecord, Depends(visible_job)]
ChangeableJob = Annotated[JobRecord, Depends(changeable_job)]
