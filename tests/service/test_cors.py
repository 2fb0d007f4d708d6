"""Pages of other origins: none may call unless the settings name them."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest
from pydantic import ValidationError

from broker.gateway_side import JobBroker
from broker.worker_side import WorkerBroker
from contract.settings import Settings

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]
PAGE = "https://studio.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, idempotency-key, prefer",
}


async def test_off_unless_asked_for(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    answer = await client.post("/v1/txt2img", json={"prompt": "a pizza"}, headers={"Origin": PAGE})
    assert answer.status_code == 202
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert (await client.options("/v1/txt2img", headers=PREFLIGHT)).status_code == 405


async def test_a_named_origin_may_call_and_read(settings: Settings, serving: Serving, worker: WorkerBroker) -> None:
    async with serving(settings.model_copy(update={"cors_origins": (PAGE,)})) as url, httpx.AsyncClient() as http:
        asked = await http.options(f"{url}/v1/txt2img", headers=PREFLIGHT)
        called = await http.post(f"{url}/v1/txt2img", json={"prompt": "a pizza"}, headers={"Origin": PAGE})
        stranger = await http.post(
            f"{url}/v1/txt2img", json={"prompt": "a pizza"}, headers={"Origin": "https://evil.example"}
        )
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "idempotency-key" in asked.headers["access-control-allow-headers"].lower()
    assert asked.headers["x-request-id"]
    assert (called.status_code, called.headers["access-control-allow-origin"]) == (202, PAGE)
    shown = {name.strip() for name in called.headers["access-control-expose-headers"].split(",")}
    assert {"Location", "Retry-After", "RateLimit", "RateLimit-Policy", "X-Request-ID"} <= shown
    assert "access-control-allow-credentials" not in called.headers
    assert "access-control-allow-origin" not in stranger.headers


async def test_refusals_can_be_read_as_well(
    settings: Settings, serving: Serving, worker: WorkerBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a page cannot tell a full queue from a broken network."""

    async def broken(self: JobBroker) -> None:
        raise RuntimeError

    changes = {"cors_origins": (PAGE,), "max_body_bytes": 1024, "rate_burst": 1, "rate_per_second": 0.01}
    body = {"prompt": "a pizza"}
    async with (
        serving(settings.model_copy(update=changes)) as url,
        httpx.AsyncClient(base_url=url, headers={"Origin": PAGE}) as http,
    ):
        assert (await http.post("/v1/txt2img", json=body)).status_code == 202
        answers = [
            await http.post("/v1/txt2img", json=body),
            await http.post("/v1/txt2img", json={}),
            await http.post("/v1/txt2img", content=b"x" * 2000),
            await http.get("/nowhere"),
            await http.put("/v1/models"),
        ]
        monkeypatch.setattr(JobBroker, "cards", broken)
        answers.append(await http.get("/v1/models"))
    assert [answer.status_code for answer in answers] == [429, 422, 413, 404, 405, 500]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE
        shown = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert {"Retry-After", "RateLimit", "RateLimit-Policy", "X-Request-ID"} <= shown
    assert answers[0].headers["retry-after"]


@pytest.mark.parametrize("origins", ["studio.example", "https://studio.example/", "https://a.example,ftp://b.example"])
def test_what_is_no_origin_is_refused_at_the_start(origins: str) -> None:
    with pytest.raises(ValidationError, match="is no origin; expected https://host"):
        Settings(cors_origins=origins)


def test_origins_come_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_CORS_ORIGINS", "https://a.example, http://localhost:3000")
    assert Settings().cors_origins == ("https://a.example", "http://localhost:3000")
