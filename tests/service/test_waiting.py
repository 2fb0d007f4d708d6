"""`Prefer: wait` as RFC 7240 writes it, and what waits while the server stops."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest

from broker.worker_side import WorkerBroker
from contract.settings import Settings
from service.waiting import seconds_to_wait


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ([], None),
        ([""], None),
        (["respond-async"], None),
        (["wait"], 60.0),
        (["wait=5"], 5.0),
        (['Wait = "5"'], 5.0),
        (["respond-async, wait=5"], 5.0),
        (["wait=5, handling=lenient"], 5.0),
        (["wait=900"], 60.0),
        (["wait=0"], 0.0),
        (["wait=soon"], None),
        (["wait=-1"], None),
        (["await=5"], None),
        (["wait-less=5"], None),
        (["respond-async", "wait=5"], 5.0),  # two lines are one list
        (["wait=7, wait=5"], 7.0),  # the first one counts
        (["wait=soon, wait=5"], None),
        (['note="please, wait=3"'], None),
        (['note="please, wait=3"; x="a,b", WAIT=4; y'], 4.0),
        (['note="not closed, wait=3'], 3.0),
        (["=5,,;, wait=6"], 6.0),
        (["wait=1.5"], None),
        (["wait=٣"], None),
    ],
)
def test_seconds_to_wait(prefer: list[str], seconds: float | None) -> None:
    assert seconds_to_wait(prefer, 60.0) == seconds


async def test_a_stopping_server_lets_nobody_hang(
    settings: Settings, worker: WorkerBroker, serving: Callable[[Settings], AbstractAsyncContextManager[str]]
) -> None:
    """Streams end and waiting requests are answered with the job as it stands; the job goes on."""

    async def follow(http: httpx.AsyncClient, url: str) -> list[str]:
        async with http.stream("GET", url) as response:
            return [line async for line in response.aiter_lines() if line.startswith(("event:", "retry:"))]

    async with httpx.AsyncClient(timeout=20) as http:
        async with serving(settings) as url:
            job = (await http.post(f"{url}/v1/txt2img", json={"prompt": "a pizza"})).json()
            following = asyncio.create_task(follow(http, job["urls"]["events"]))
            held_back = http.post(
                f"{url}/v1/txt2img?cancel_on_disconnect=true", json={"prompt": "a panda"}, headers={"Prefer": "wait=15"}
            )
            waiting = asyncio.create_task(held_back)
            await asyncio.sleep(0.3)
        assert await following == ["event: queued", "retry: 1000"]  # told to come back soon
        answer = await waiting
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    assert len(worker.take(8)) == 2
