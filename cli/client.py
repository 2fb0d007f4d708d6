"""The HTTP client: any Darkroom server, as the design's HTTP section describes it. Synchronous, one per thread."""

import base64
import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import httpx
from httpx_sse import ServerSentEvent, SSEError, connect_sse
from pydantic import BaseModel, ConfigDict, Field

from contract.events import TERMINAL_TYPES
from contract.spec import JobStatus, JobWarning, Task, Timings

POLL_SECONDS = 0.25
SUBMIT_TRIES = 4
EVENT_SILENCE_SECONDS = 60.0  # the server sends keep-alives far more often


class View(BaseModel):
    """What the server says; unknown fields are left alone, so that an older client reads a newer server."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Progress(View):
    step: int = 0
    steps: int = 0


class Picture(View):
    index: int
    seed: int
    url: str
    width: int
    height: int
    content_type: str
    bytes: int
    sha256: str


class Urls(View):
    self: str
    events: str
    cancel: str


class Job(View):
    """A job as `GET /v1/jobs/{id}` shows it; `error` is a problem (RFC 9457)."""

    id: str
    task: Task
    model: str
    status: JobStatus
    created_at: str
    queue_position: int | None = None
    progress: Progress | None = None
    request: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[JobWarning, ...] = ()
    images: tuple[Picture, ...] = ()
    error: dict[str, Any] | None = None
    timings: Timings | None = None
    urls: Urls


class Update(View):
    """One step of a job's way: progress is in denoising steps of the slowest picture."""

    status: JobStatus
    step: int = 0
    steps: int = 0
    queue_position: int | None = None


class ApiError(Exception):
    """The server refused: the problem's title, detail and one line per field."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.problem = dict(problem)
        super().__init__(describe_problem(self.problem))


class JobFailedError(Exception):
    """The job ended as failed or cancelled."""


def describe_problem(problem: Mapping[str, Any]) -> str:
    head = f"{problem.get('title', 'error')} ({problem.get('code', problem.get('status', '?'))})"
    lines = [f"{head}: {problem['detail']}" if problem.get("detail") else head]
    lines += [f"  {entry.get('pointer', '')}: {entry.get('detail', '')}" for entry in problem.get("errors", ())]
    return "\n".join(lines)


class DarkroomClient:
    """Use as a context manager. Raises `ApiError` for refusals and `httpx.TransportError` where no server answers."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, task: Task, fields: Mapping[str, Any], **pictures: bytes) -> Job:
        """POST the job; `pictures` are the files `image`, `mask` and `semantic_map`.

        Tries again when the server is busy or away.
        The Idempotency-Key makes trying again safe: at most one job comes of it.
        """
        body = dict(fields) | {name: base64.b64encode(data).decode() for name, data in pictures.items()}
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        for last_try in (*[False] * (SUBMIT_TRIES - 1), True):
            response = self._http.post(f"/v1/{task.value}", json=body, headers=headers)
            if response.status_code not in (429, 503) or last_try:
                break
            time.sleep(min(float(response.headers.get("Retry-After", "1")), 30.0))
        return Job.model_validate(_checked(response).json())

    def job(self, job_id: str) -> Job:
        return Job.model_validate(self._get(f"/v1/jobs/{job_id}"))

    def jobs(self, status: JobStatus | None = None, limit: int = 20, cursor: str | None = None) -> dict[str, Any]:
        """One page of the key's jobs, as the server gives it."""
        given = {"status": status.value if status else None, "limit": limit, "cursor": cursor}
        params = {name: value for name, value in given.items() if value is not None}
        page: dict[str, Any] = self._get("/v1/jobs", params)
        return page

    def cancel(self, job_id: str) -> Job:
        return Job.model_validate(_checked(self._http.post(f"/v1/jobs/{job_id}/cancel")).json())

    def delete(self, job_id: str) -> None:
        _checked(self._http.delete(f"/v1/jobs/{job_id}"))

    def models(self) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self._get("/v1/models")["data"]
        return data

    def ready(self) -> dict[str, int] | None:
        """Live workers of each model; None while the gateway cannot take jobs."""
        try:
            response = self._http.get("/readyz")
        except httpx.TransportError:
            return None
        return dict(response.json()["models"]) if response.is_success else None

    def follow(self, job: Job) -> Iterator[Update]:
        """Updates until the job has ended: by its events, or by asking again and again where events do not come."""
        try:
            yield from self._follow_events(job)
        except (httpx.TransportError, SSEError):
            yield from self._poll(job)

    def result(self, job: Job) -> Job:
        """The ended job. Raises `JobFailedError` unless it succeeded."""
        ended = self.job(job.id)
        if ended.status is JobStatus.SUCCEEDED:
            return ended
        why = describe_problem(ended.error) if ended.error else f"the job is {ended.status.value}"
        raise JobFailedError(f"job {job.id}: {why}")

    def download(self, picture: Picture) -> bytes:
        """The file's bytes, compared with the digest that the server gave.

        The URL is signed, and may be the object store's own: it must not get the API key.
        """
        data = _checked(httpx.get(picture.url, timeout=self._http.timeout)).content
        if hashlib.sha256(data).hexdigest() != picture.sha256:
            raise OSError(f"{picture.url}: the file is not the one that was stored; download it again")
        return data

    def _get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        return _checked(self._http.get(path, params=dict(params or {}))).json()

    def _follow_events(self, job: Job) -> Iterator[Update]:
        timeout = httpx.Timeout(10.0, read=EVENT_SILENCE_SECONDS)
        with connect_sse(self._http, "GET", job.urls.events, timeout=timeout) as source:
            if source.response.is_error:
                source.response.read()
                _checked(source.response)
            for event in source.iter_sse():
                update = _update_of(event)
                if update is not None:
                    yield update
                    if update.status.ended:
                        return
        raise SSEError("the stream of events ended before the job did")

    def _poll(self, job: Job) -> Iterator[Update]:
        while True:
            now = self.job(job.id)
            yield _update_from(now)
            if now.status.ended:
                return
            time.sleep(POLL_SECONDS)


_STATUS_OF_EVENT: Mapping[str, Literal[JobStatus.QUEUED, JobStatus.RUNNING]] = {
    "queued": JobStatus.QUEUED,
    "started": JobStatus.RUNNING,
    "progress": JobStatus.RUNNING,
}


def _update_of(event: ServerSentEvent) -> Update | None:
    """None for events that say nothing about progress, such as previews."""
    if event.event in TERMINAL_TYPES:
        return Update(status=JobStatus(event.event))
    status = _STATUS_OF_EVENT.get(event.event)
    if status is None:
        return None
    data = json.loads(event.data)
    if "id" in data:  # the first event tells the whole job
        return _update_from(Job.model_validate(data))
    return Update(status=status, step=data.get("step", 0), steps=data.get("steps", 0))


def _update_from(job: Job) -> Update:
    progress = job.progress or Progress()
    return Update(status=job.status, step=progress.step, steps=progress.steps, queue_position=job.queue_position)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"title": f"HTTP {response.status_code}", "detail": response.text[:500]}
    raise ApiError(response.status_code, problem)
