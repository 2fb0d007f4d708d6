"""A job as clients see it."""

import time
from datetime import UTC, datetime
from typing import Any, Final, Literal

from fastapi import Request
from pydantic import BaseModel, Field

from broker.jobs import JobRecord
from contract.spec import JobResult, JobSpec, JobStatus, JobWarning, PictureResult, Task, Timings
from service.problems import Problem, problem_of_job
from service.state import GatewayState

# Not part of what the client asked for, or told elsewhere in the job.
_NOT_REQUEST: Final = {"version", "id", "task", "inputs", "created_at", "api_key_id", "request_id"}
_ONLY_IF_GIVEN: Final = ("prompt", "class_label", "layout", "noise_level")


class ProgressView(BaseModel):
    step: int = Field(description="denoising steps done, of the slowest picture")
    steps: int


class ImageView(BaseModel):
    """A finished picture; `url` is signed and expires, a fresh one comes with every answer."""

    index: int
    seed: int = Field(description="makes this picture again")
    url: str
    width: int
    height: int
    content_type: str
    bytes: int = Field(description="size of the file")
    sha256: str = Field(description="of the file, in hex")


class UrlsView(BaseModel):
    self: str
    events: str = Field(description="server-sent events")
    cancel: str = Field(description="POST here to stop the job")


class JobView(BaseModel):
    """A job. Times are RFC 3339 in UTC, durations in seconds."""

    id: str
    object: Literal["job"] = "job"
    task: Task
    model: str
    key: str | None = Field(default=None, description="id of the API key that made it; null: made without one")
    status: JobStatus
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    queue_position: int | None = Field(default=None, description="jobs ahead of this one; null once it has started")
    progress: ProgressView
    request: dict[str, Any] = Field(description="what is being made, defaults and the drawn seed included")
    warnings: list[JobWarning] = Field(description="words the model does not know, words cut off, and the like")
    images: list[ImageView] = Field(description="the pictures, once the job has succeeded")
    error: Problem | None = Field(default=None, description="why the job failed")
    timings: Timings | None = Field(default=None, description="seconds of each stage, once the job has succeeded")
    urls: UrlsView


class JobList(BaseModel):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    next_cursor: str | None = Field(default=None, description="send it as `cursor` to go on; null at the end")


async def view_job(record: JobRecord, request: Request) -> JobView:
    """May raise what Redis and the store raise, for the signatures of the URLs."""
    state = GatewayState.of(request)
    base = state.base_url(request)
    here = f"{base}/v1/jobs/{record.spec.id}"
    return JobView(
        id=record.spec.id,
        task=record.spec.task,
        model=record.spec.model,
        key=record.spec.api_key_id,
        status=record.status,
        created_at=rfc3339(record.created_at),
        started_at=None if record.started_at is None else rfc3339(record.started_at),
        finished_at=None if record.finished_at is None else rfc3339(record.finished_at),
        queue_position=record.queue_position,
        progress=ProgressView(step=record.step, steps=record.steps),
        request=_request_of(record.spec),
        warnings=list(record.warnings),
        images=await _images(record.result, state, base),
        error=problem_of_job(record.error) if record.error else None,
        timings=record.result.timings if record.result else None,
        urls=UrlsView(self=here, events=f"{here}/events", cancel=f"{here}/cancel"),
    )


def rfc3339(unix_seconds: float) -> str:
    text = datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _request_of(spec: JobSpec) -> dict[str, Any]:
    """The request that, with the same pictures, makes the same job again."""
    left_out = set(_NOT_REQUEST)
    if spec.task is not Task.TXT2IMG or "semantic_map" in spec.inputs:
        left_out |= {"width", "height"}  # they follow from the picture
    if spec.task not in (Task.IMG2IMG, Task.INPAINT):
        left_out.add("strength")
    left_out |= {field for field in _ONLY_IF_GIVEN if getattr(spec, field) in ("", None, ())}
    return spec.model_dump(mode="json", exclude=left_out)


async def _images(result: JobResult | None, state: GatewayState, base: str) -> list[ImageView]:
    if result is None:
        return []
    return [
        ImageView(url=await _signed_url(picture, state, base), **picture.model_dump(exclude={"key"}))
        for picture in result.pictures
    ]


async def _signed_url(picture: PictureResult, state: GatewayState, base: str) -> str:
    seconds = state.settings.signed_url_seconds
    by_store = await state.broker.store.sign(picture.key, seconds)
    if by_store is not None:
        return by_store
    expires = int(time.time()) + seconds
    signature = (await state.signer()).sign(picture.key, picture.sha256, expires)
    return f"{base}/v1/images/{picture.key}?sha256={picture.sha256}&expires={expires}&signature={signature}"
