"""`Idempotency-Key`: one job per key and body, whatever races, through whichever gateway."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from itertools import cycle
from pathlib import Path

import httpx
import pytest
from PIL import Image

from broker.connection import connect_async
from broker.idempotency import Claims
from broker.worker_side import WorkerBroker
from contract.settings import Settings

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]
KEY = {"Idempotency-Key": "order 17"}
BODY = {"prompt": "a pizza"}


def picture(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
async def two_gateways(
    settings: Settings, worker: WorkerBroker, serving: Serving
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    async with (
        serving(settings) as one,
        serving(settings) as other,
        httpx.AsyncClient(base_url=one, timeout=20) as first,
        httpx.AsyncClient(base_url=other, timeout=20) as second,
    ):
        yield first, second


async def test_a_race_through_two_gateways_makes_one_job(
    two_gateways: tuple[httpx.AsyncClient, httpx.AsyncClient], queued: Callable[[], int]
) -> None:
    turns = cycle(two_gateways)
    answers = await asyncio.gather(*(next(turns).post("/v1/txt2img", json=BODY, headers=KEY) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len({answer.json()["request"]["seed"] for answer in answers}) == 1  # drawn once
    assert queued() == 1


async def test_another_body_is_refused_in_a_race_as_well(
    two_gateways: tuple[httpx.AsyncClient, httpx.AsyncClient], queued: Callable[[], int]
) -> None:
    turns = cycle(two_gateways)
    bodies = [BODY | {"seed": index} for index in range(10)]
    answers = await asyncio.gather(*(next(turns).post("/v1/txt2img", json=body, headers=KEY) for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [202] + [422] * 9
    assert {answer.json()["code"] for answer in answers if answer.status_code == 422} == {"idempotency_mismatch"}
    assert queued() == 1


async def test_a_race_with_pictures_stores_them_once(
    two_gateways: tuple[httpx.AsyncClient, httpx.AsyncClient], settings: Settings, queued: Callable[[], int]
) -> None:
    turns = cycle(two_gateways)
    answers = await asyncio.gather(
        *(next(turns).post("/v1/upscale", files={"image": picture()}, headers=KEY) for _ in range(8))
    )
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 202}) == 1
    again = await next(turns).post("/v1/upscale", files={"image": picture()}, headers=KEY)
    assert again.status_code == 202
    assert again.json()["id"] in {answer.json().get("id") for answer in answers}
    assert queued() == 1
    inputs = Path(settings.store_url.removeprefix("file:")) / "inputs"
    assert [folder.name for folder in inputs.iterdir() if any(folder.iterdir())] == [again.json()["id"]]


async def test_while_the_first_stores_its_pictures_the_others_wait(
    client: httpx.AsyncClient, settings: Settings, worker: WorkerBroker, queued: Callable[[], int]
) -> None:
    async with connect_async(settings.redis_url) as connection:
        claims = Claims(connection)  # as another gateway would
        token = await claims.claim(None, KEY["Idempotency-Key"])
        assert token is not None
        early = await client.post("/v1/upscale", files={"image": picture()}, headers=KEY)
        assert (early.status_code, early.json()["code"]) == (409, "idempotency_conflict")
        assert early.headers["retry-after"] == "1"
        assert queued() == 0
        await claims.release(None, KEY["Idempotency-Key"], token)
    first = await client.post("/v1/upscale", files={"image": picture()}, headers=KEY)
    again = await client.post("/v1/upscale", files={"image": picture()}, headers=KEY)
    other = await client.post("/v1/upscale", files={"image": picture(shade=9)}, headers=KEY)
    assert [answer.status_code for answer in (first, again, other)] == [202, 202, 422]
    assert first.json()["id"] == again.json()["id"]
    assert queued() == 1


async def test_a_refused_request_leaves_its_key_free(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    refused = await client.post("/v1/upscale", files={"image": b"no picture"}, headers=KEY)
    assert refused.status_code == 422
    assert (await client.post("/v1/upscale", files={"image": picture()}, headers=KEY)).status_code == 202


async def test_the_same_key_for_another_task_is_another_body(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    assert (await client.post("/v1/upscale", files={"image": picture()}, headers=KEY)).status_code == 202
    files = {"image": picture()}
    other = await client.post("/v1/img2img", files=files, data=BODY, headers=KEY)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


async def test_waiting_with_a_used_key_waits_for_its_job(client: httpx.AsyncClient, painter: object) -> None:
    answers = await asyncio.gather(
        *(client.post("/v1/txt2img", json=BODY, headers=KEY | {"Prefer": "wait=15"}) for _ in range(3))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["images"][0]["sha256"] for answer in answers}) == 1
    assert len({answer.json()["id"] for answer in answers}) == 1
