"""The four tasks: a request becomes a job, answered at once or, with `Prefer: wait`, when it has ended."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Final

import structlog
from fastapi import APIRouter, Header, Query, Request, Response

from broker.jobs import JobRecord
from broker.store import Store
from broker.submit import Submitted
from contract import keys
from contract.errors import ErrorCode
from contract.spec import JobSpec, Task
from service.auth import Caller
from service.body import read_request
from service.jobs_view import JobView, view_job
from service.normalise import build_spec, check_limits, check_pictures, choose_model
from service.openapi import request_body
from service.routes.common import State, find_job, problems
from service.schemas import REQUESTS, PictureRequest, pictures_of
from service.state import GatewayState
from service.uploads import Picture

router = APIRouter(prefix="/v1", tags=["pictures"])
_log = structlog.get_logger("darkroom.jobs")

_WAIT: Final = re.compile(r"\bwait\b(?:\s*=\s*\"?([0-9]{1,6})\b)?", re.IGNORECASE)
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
    ErrorCode.MODEL_NOT_FOUND,
    ErrorCode.BODY_TOO_LARGE,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE,
    ErrorCode.VALIDATION_FAILED,
    ErrorCode.IMAGE_INVALID,
    ErrorCode.IMAGE_TOO_LARGE,
    ErrorCode.IDEMPOTENCY_MISMATCH,
    ErrorCode.RATE_LIMITED,
    ErrorCode.QUEUE_FULL,
    ErrorCode.STORE_UNAVAILABLE,
)

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="repeat a request with the same key and get the same job, not a second one",
    ),
]
Prefer = Annotated[
    str | None,
    Header(
        description="`wait=30`: answer when the job has ended, after 30 s at the latest; `wait`: as long as allowed"
    ),
]
CancelOnDisconnect = Annotated[
    bool, Query(description="with `Prefer: wait`: cancel the job if this connection breaks before it has ended")
]


@dataclass(frozen=True, slots=True)
class Order:
    """A request with all its parts read and checked."""

    task: Task
    request: PictureRequest
    pictures: dict[str, Picture]
    caller: str | None

    def body_hash(self) -> str:
        """The same for the same request, sent as JSON or as a form; taken before a seed is drawn."""
        fields = self.request.model_dump_json(exclude={"image", "mask"}, exclude_unset=True)
        sources = [f"{name}={picture.source_sha256}" for name, picture in sorted(self.pictures.items())]
        return sha256("\n".join([self.task.value, fields, *sources]).encode()).hexdigest()


async def submit(state: GatewayState, order: Order, idempotency_key: str | None) -> Submitted:
    """Queues the order's job, its pictures stored before. Where no new job came of it, nothing is left in the store."""
    card = choose_model(await state.broker.cards(), order.task, order.request.model)
    check_limits(order.request, card, state.settings)
    check_pictures(order.task, order.pictures, card, state.settings)
    spec = build_spec(order.task, order.request, order.pictures, card, order.caller, time.time())
    created = False
    try:
        for name, picture in order.pictures.items():
            await state.broker.store.put_async(spec.inputs[name], picture.png, "image/png")
        body_hash = order.body_hash() if idempotency_key else None
        submitted = await state.broker.submit(spec, idempotency_key, body_hash)
        created = submitted.created
    finally:
        if order.pictures and not created:
            await asyncio.to_thread(_forget_inputs, state.broker.store, spec)
    if created:
        said = {"prompt": spec.prompt} if state.settings.log_prompts else {}
        _log.info("submitted", job=spec.id, task=spec.task, model=spec.model, n=spec.n, key=spec.api_key_id, **said)
    return submitted


def _forget_inputs(store: Store, spec: JobSpec) -> None:
    store.delete_folder(keys.inputs_of(spec.id))


def seconds_to_wait(prefer: str | None, most: float) -> float | None:
    """What `Prefer: wait[=seconds]` asks for (RFC 7240), at most `most`; None: not to wait."""
    found = _WAIT.search(prefer or "")
    if found is None:
        return None
    return min(float(found.group(1)), most) if found.group(1) else most


async def wait_for_end(request: Request, state: GatewayState, job_id: str, seconds: float, cancel: bool) -> None:
    """Until the job has ended, `seconds` have passed or the client has left; then, with `cancel`, cancels the job."""
    waiting = asyncio.create_task(state.broker.wait(job_id, seconds))
    leaving = asyncio.create_task(_client_leaves(request))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            waiting.result()  # raises what it met
        elif cancel:
            await state.broker.cancel(job_id)
    finally:
        waiting.cancel()
        leaving.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)


async def _client_leaves(request: Request) -> None:
    """The body has been read, so the only message to come is the disconnect."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _endpoint(task: Task) -> Callable[..., Awaitable[JobView]]:
    async def generate(
        request: Request,
        response: Response,
        state: State,
        caller: Caller,
        idempotency_key: IdempotencyKey = None,
        prefer: Prefer = None,
        cancel_on_disconnect: CancelOnDisconnect = False,
    ) -> JobView:
        asked = await read_request(request, REQUESTS[task], state.settings.max_body_bytes)
        pictures = await state.uploads.decode(pictures_of(asked))
        submitted = await submit(state, Order(task, asked, pictures, caller), idempotency_key)
        seconds = seconds_to_wait(prefer, state.settings.max_wait_seconds)
        if seconds is not None:
            await wait_for_end(request, state, submitted.job_id, seconds, cancel_on_disconnect)
            response.headers["Preference-Applied"] = f"wait={seconds:g}"
        job = await find_job(state, submitted.job_id, caller)
        return await _answer(request, response, job, waited=seconds is not None)

    generate.__doc__ = REQUESTS[task].__doc__
    generate.__name__ = task.value
    return generate


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
            200: {"model": JobView, "description": "With `Prefer: wait`: the job, ended"},
            **problems(*_REFUSALS),
        },
        openapi_extra=request_body(_task),
    )
