"""Keys, headers, health, figures, models; and what clients see while Redis or the store is away."""

import io
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from pydantic import SecretStr

from broker.embedded import EmbeddedValkey
from broker.gateway_side import JobBroker
from broker.worker_side import WorkerBroker
from contract.settings import Settings

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]
PROMPT = "a pizza on a blue background"


async def test_health_and_readiness(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    ready = await client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    names = ("darkroom-small", "darkroom-small-x4", "faces", "imagenet", "layout", "plain-x4", "semantic")
    assert ready.json()["models"] == dict.fromkeys(names, 1)
    worker.close()
    assert (await client.get("/readyz")).json()["models"] == dict.fromkeys(names, 0)


async def test_heads_are_answered_where_monitors_ask_for_them(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    for path in ("/healthz", "/readyz", "/docs"):
        answer = await client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == str(len((await client.get(path)).content))


async def test_a_model_without_a_worker_still_takes_jobs(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    worker.close()
    assert (await client.post("/v1/txt2img", json={"prompt": PROMPT})).status_code == 202


async def test_models_tell_what_they_know(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    small, x4, *_ = (await client.get("/v1/models")).json()["data"]
    assert (small["id"], small["object"], small["workers"]) == ("darkroom-small", "model", 1)
    assert small["tasks"] == ["txt2img", "img2img", "inpaint"]
    assert small["vocabulary"]["objects"] == ["pizza", "panda"]
    assert (x4["id"], x4["upscale_factor"]) == ("darkroom-small-x4", 4)


async def test_figures(client: httpx.AsyncClient, painter: Any) -> None:
    await client.post("/v1/txt2img", json={"prompt": PROMPT, "n": 3}, headers={"Prefer": "wait"})
    await client.get("/v1/jobs/secret-id")
    await client.get("/no/such/place")
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for line in (
        'darkroom_jobs_submitted_total{model="darkroom-small",priority="interactive",task="txt2img"} 1.0',
        'darkroom_jobs_ended_total{model="darkroom-small",status="succeeded",task="txt2img"} 1.0',
        'darkroom_pictures_total{model="darkroom-small",task="txt2img"} 3.0',
        'darkroom_queue_depth{model="darkroom-small",priority="interactive"} 0.0',
        'darkroom_workers{model="darkroom-small"} 1.0',
        "darkroom_running_executions 0.0",
        "darkroom_sse_clients 0.0",
        'darkroom_http_requests_total{method="POST",route="/v1/txt2img",status="200"} 1.0',
        'darkroom_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 1.0',
        'darkroom_http_requests_total{method="GET",route="unmatched",status="404"} 1.0',
    ):
        assert line in answer.text
    assert "secret-id" not in answer.text


async def test_headers(client: httpx.AsyncClient) -> None:
    given = await client.get("/healthz", headers={"X-Request-ID": "from-the-proxy"})
    assert given.headers["x-request-id"] == "from-the-proxy"
    odd = await client.get("/healthz", headers={"X-Request-ID": "a b{}"})
    assert odd.headers["x-request-id"] != "a b{}"
    for name, value in (
        ("x-content-type-options", "nosniff"),
        ("cache-control", "no-store"),
        ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ):
        assert odd.headers[name] == value


@pytest.fixture
async def locked(settings: Settings, serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway with two keys."""
    keys = {"api_keys": (SecretStr("key-of-ann"), SecretStr("key-of-bob"))}
    async with serving(settings.model_copy(update=keys)) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def test_keys(locked: httpx.AsyncClient, painter: Any) -> None:
    ann, bob = {"Authorization": "Bearer key-of-ann"}, {"X-API-Key": "key-of-bob"}
    body = {"prompt": PROMPT}
    for headers in (
        {},
        {"X-API-Key": "key-of-eve"},
        {"Authorization": "Bearer key-of-"},
        {"Authorization": "Basic eA=="},
    ):
        refused = await locked.post("/v1/txt2img", json=body, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/v1/jobs", "/v1/jobs/x"):
        assert (await locked.get(path)).status_code == 401
    job = (await locked.post("/v1/txt2img", json=body, headers=ann | {"Prefer": "wait"})).json()
    assert (await locked.get(job["urls"]["self"], headers=ann)).status_code == 200
    assert (await locked.get(job["images"][0]["url"])).status_code == 200  # signed: no key needed
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events")):
        hidden = await locked.request(method, f"/v1/jobs/{job['id']}{path}", headers=bob)
        assert (hidden.status_code, hidden.json()["code"]) == (404, "job_not_found")
    assert (await locked.get("/v1/jobs", headers=bob)).json()["data"] == []
    assert len((await locked.get("/v1/jobs", headers=ann)).json()["data"]) == 1
    assert (await locked.get("/healthz")).status_code == 200


async def test_too_many_requests(settings: Settings, serving: Serving, worker: WorkerBroker) -> None:
    slow = settings.model_copy(update={"rate_per_second": 0.5, "rate_burst": 2})
    async with serving(slow) as url, httpx.AsyncClient(base_url=url) as http:
        answers = [await http.post("/v1/txt2img", json={"prompt": PROMPT}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[2].json()["code"] == "rate_limited"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 2


async def test_a_full_queue(settings: Settings, serving: Serving, worker: WorkerBroker) -> None:
    short = settings.model_copy(update={"max_queue_depth": 1})
    async with serving(short) as url, httpx.AsyncClient(base_url=url) as http:
        answers = [await http.post("/v1/txt2img", json={"prompt": PROMPT}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 429]
    assert answers[1].json()["code"] == "queue_full"
    assert answers[1].headers["retry-after"] == "5"


async def test_urls_stay_right_behind_a_proxy(settings: Settings, serving: Serving, painter: Any) -> None:
    public = settings.model_copy(update={"public_url": "https://pictures.example/darkroom/", "allow_anonymous": True})
    async with serving(public) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
        job = (await http.post("/v1/txt2img", json={"prompt": PROMPT}, headers={"Prefer": "wait"})).json()
    assert job["urls"]["self"] == f"https://pictures.example/darkroom/v1/jobs/{job['id']}"
    assert job["images"][0]["url"].startswith("https://pictures.example/darkroom/v1/images/outputs/")


async def test_signed_urls_expire(
    settings: Settings, serving: Serving, painter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(settings) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
        job = (await http.post("/v1/txt2img", json={"prompt": PROMPT}, headers={"Prefer": "wait"})).json()
        expires = int(httpx.URL(job["images"][0]["url"]).params["expires"])
        monkeypatch.setattr("service.routes.images.time.time", lambda: expires + 1.0)
        late = await http.get(job["images"][0]["url"])
    assert (late.status_code, late.json()["code"]) == (403, "url_expired")


async def test_redis_comes_and_goes(settings: Settings, serving: Serving) -> None:
    """The gateway starts without Redis, says so, and works once it is there."""
    server = EmbeddedValkey()
    server.start()
    away = settings.model_copy(update={"redis_url": server.url})
    worker = WorkerBroker(away, [], slots=1)
    worker.close()
    server.stop()
    async with serving(away) as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
        for answer in (
            await http.get("/readyz"),
            await http.post("/v1/txt2img", json={"prompt": PROMPT}),
            await http.get("/v1/jobs"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, "broker_unavailable")
            assert int(answer.headers["retry-after"]) > 0
        server.start()
        assert (await http.get("/readyz")).status_code == 200
    server.stop()


async def test_the_store_is_away(settings: Settings, serving: Serving, worker: WorkerBroker) -> None:
    """Where the input pictures cannot be written, no job comes of it."""
    folder = Path(settings.store_url.removeprefix("file:"))
    async with serving(settings) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
        (folder / "inputs").write_text("no folder")
        answer = await http.post("/v1/upscale", files={"image": small_png()})
        assert (await http.get("/v1/jobs")).json()["data"] == []
        (folder / "outputs").write_text("no folder")
        for one in (answer, await http.get("/readyz")):
            assert (one.status_code, one.json()["code"]) == (503, "store_unavailable")
            assert int(one.headers["retry-after"]) > 0


def small_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    return file.getvalue()


async def test_a_defect_tells_nothing_but_the_request_id(
    settings: Settings, serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(self: JobBroker) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(JobBroker, "cards", broken)
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
    async with serving(settings) as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.get("/v1/models")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "internal"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text


async def test_prompts_are_logged_only_when_asked(
    settings: Settings, serving: Serving, worker: WorkerBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    for log_prompts in (False, True):
        asked = settings.model_copy(update={"log_prompts": log_prompts})
        async with serving(asked) as url, httpx.AsyncClient(base_url=url) as http:
            await http.post("/v1/txt2img", json={"prompt": PROMPT, "negative_prompt": "secret wish"})
        logged = capsys.readouterr().out
        assert "route=/v1/txt2img" in logged
        assert (PROMPT in logged) is log_prompts
        assert "secret wish" not in logged
