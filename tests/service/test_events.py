"""Server-sent events over HTTP: snapshot, live events, previews, replay, the end."""

import asyncio
import json
from base64 import b64decode
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse
from redis import Redis

from broker.worker_side import WorkerBroker
from contract import keys
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobError, JobResult

PROMPT = "a pizza on a blue background"


async def submit(client: httpx.AsyncClient) -> dict[str, Any]:
    job: dict[str, Any] = (await client.post("/v1/txt2img", json={"prompt": PROMPT, "steps": 4})).json()
    return job


async def read(client: httpx.AsyncClient, url: str, last_event_id: str | None = None) -> list[ServerSentEvent]:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    async with aconnect_sse(client, "GET", url, headers=headers) as source:
        source.response.raise_for_status()
        assert source.response.headers["cache-control"] == "no-cache"
        return [event async for event in source.aiter_sse()]


def data(event: ServerSentEvent) -> Any:
    return json.loads(event.data)


async def test_a_follower_sees_the_whole_life(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    job = await submit(client)
    following = asyncio.create_task(read(client, job["urls"]["events"]))
    await asyncio.sleep(0.1)
    (taken,) = worker.take(1)
    worker.progress(taken, 1, 4)
    worker.preview(taken, 0, 1, b"a small jpeg", "image/jpeg")
    await asyncio.sleep(0.2)  # previews are read when they are sent
    worker.progress(taken, 4, 4)
    worker.succeed(taken, JobResult(pictures=()))
    events = await following
    assert [event.event for event in events] == ["queued", "started", "progress", "preview", "progress", "succeeded"]
    assert data(events[0])["id"] == job["id"]
    assert data(events[2]) == {"status": "running", "step": 1, "steps": 4}
    preview = data(events[3])
    assert b64decode(preview.pop("image")) == b"a small jpeg"
    assert preview == {"index": 0, "step": 1, "content_type": "image/jpeg"}
    assert data(events[-1])["status"] == "succeeded"

    replayed = await read(client, job["urls"]["events"], last_event_id=events[2].id)
    assert [event.event for event in replayed] == ["progress", "succeeded"]  # the preview has gone with the job's end
    assert [event.id for event in replayed] == [events[4].id, events[5].id]
    again = await read(client, job["urls"]["events"], last_event_id=events[-1].id)
    assert [event.event for event in again] == ["succeeded"]  # for a client that lost its place


async def test_a_late_follower_starts_with_a_snapshot(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    job = await submit(client)
    (taken,) = worker.take(1)
    worker.progress(taken, 4, 4)
    following = asyncio.create_task(read(client, job["urls"]["events"]))
    await asyncio.sleep(0.1)
    worker.fail(taken, JobError(code=ErrorCode.OUT_OF_MEMORY, detail="too large for 8 GB"))
    events = await following
    assert [event.event for event in events] == ["started", "failed"]
    assert data(events[0])["progress"] == {"step": 4, "steps": 4}
    assert data(events[1])["error"]["code"] == "out_of_memory"
    assert data(events[1])["error"]["detail"] == "too large for 8 GB"


async def test_an_ended_job_tells_its_end_even_when_its_events_are_gone(
    client: httpx.AsyncClient, worker: WorkerBroker, redis_client: Redis
) -> None:
    job = await submit(client)
    await client.post(job["urls"]["cancel"])
    assert [event.event for event in await read(client, job["urls"]["events"])] == ["cancelled"]
    redis_client.delete(keys.events(job["id"]))
    assert [event.event for event in await read(client, job["urls"]["events"])] == ["cancelled"]
    events = await read(client, job["urls"]["events"], last_event_id="1-0")
    assert [event.event for event in events] == ["cancelled"]


async def test_a_silent_stream_is_kept_alive(client: httpx.AsyncClient, worker: WorkerBroker, monkeypatch: Any) -> None:
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.05)
    job = await submit(client)
    async with client.stream("GET", job["urls"]["events"]) as response:
        lines = response.aiter_lines()
        assert any([line.startswith(": ping") async for line in until_ping(lines)])


async def until_ping(lines: Any) -> Any:
    async with asyncio.timeout(5):
        async for line in lines:
            yield line
            if line.startswith(":"):
                return


async def test_followers_are_counted_and_forgotten(
    client: httpx.AsyncClient, worker: WorkerBroker, settings: Settings
) -> None:
    job = await submit(client)
    async with client.stream("GET", job["urls"]["events"]) as response:
        lines = response.aiter_lines()  # held, since without it the response would be closed
        await anext(lines)
        assert await followers(client, 1)
    assert await followers(client, 0)


async def followers(client: httpx.AsyncClient, expected: int) -> bool:
    for _ in range(100):
        if f"darkroom_sse_clients {expected}.0" in (await client.get("/metrics")).text:
            return True
        await asyncio.sleep(0.02)
    return False
