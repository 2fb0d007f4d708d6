"""A key's limits are asked before a picture is looked at: who has met one cannot make the gateway work."""

import io

import httpx
import pytest
from PIL import Image
from redis import Redis

from broker.api_keys import Scope, create_key
from broker.quotas import OwnLimits
from broker.worker_side import WorkerBroker

BROKEN = {"image": b"\x89PNG\r\n\x1a\n, and no picture"}


@pytest.fixture
def headers(redis_client: Redis) -> dict[str, str]:
    """Of a key that may submit once."""
    limits = OwnLimits(rate_per_second=0.001, rate_burst=1)
    return {"X-API-Key": create_key(redis_client, "team", (Scope.SUBMIT, Scope.READ), limits)[1]}


async def test_beyond_a_limit_no_picture_is_decoded(
    client: httpx.AsyncClient, worker: WorkerBroker, headers: dict[str, str]
) -> None:
    looked_at = await client.post("/v1/upscale", files=BROKEN, headers=headers)
    assert (looked_at.status_code, looked_at.json()["code"]) == (422, "image_invalid")  # and took nothing
    assert (await client.post("/v1/txt2img", json={"prompt": "a pizza"}, headers=headers)).status_code == 202
    refused = await client.post("/v1/upscale", files=BROKEN, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) > 900
    assert refused.headers["ratelimit"].startswith('"submits";r=0;')


async def test_a_repeated_request_is_not_refused(
    client: httpx.AsyncClient, worker: WorkerBroker, headers: dict[str, str]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    again, files = headers | {"Idempotency-Key": "order 17"}, {"image": file.getvalue()}
    first, second = [await client.post("/v1/upscale", files=files, headers=again) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    other = await client.post("/v1/upscale", files=files, headers=headers | {"Idempotency-Key": "order 18"})
    assert other.json()["code"] == "rate_limited"
