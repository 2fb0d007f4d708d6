"""Who may do what: keys made and revoked while two gateways run, scopes, strangers, limits in the answers' headers."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from redis import Redis

from broker.api_keys import Scope, create_key, key_id, limit_key, revoke_key
from broker.embedded import EmbeddedValkey, free_port
from broker.key_ring import CACHE_SECONDS
from broker.quotas import OwnLimits
from broker.worker_side import WorkerBroker
from contract.settings import Settings
from service.app import create_app
from service.auth_keys import NoKeysError, allows_anonymous, require_keys

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]
Clients = tuple[httpx.AsyncClient, httpx.AsyncClient]
BODY = {"prompt": "a pizza"}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def make_key(redis_client: Redis, *scopes: Scope, **own: float) -> dict[str, str]:
    """The headers of a new key."""
    limits = OwnLimits.model_validate(own)
    return bearer(create_key(redis_client, "team", scopes or (Scope.SUBMIT, Scope.READ), limits)[1])


def id_of(headers: dict[str, str]) -> str:
    return key_id(headers["Authorization"].removeprefix("Bearer "))


@pytest.fixture
async def two(settings: Settings, serving: Serving) -> AsyncIterator[Clients]:
    """Two gateways over one Redis."""
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serving(settings)) for _ in range(2)]
        first, second = [await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20)) for url in urls]
        yield first, second


async def test_keys_come_and_go_while_gateways_run(two: Clients, worker: WorkerBroker, redis_client: Redis) -> None:
    """Open on loopback until the first key is made, and never again, also not when the last one is revoked."""
    for client in two:
        assert (await client.post("/v1/txt2img", json=BODY)).status_code == 202
    key = make_key(redis_client)
    await asyncio.sleep(CACHE_SECONDS)
    for client in two:
        assert (await client.post("/v1/txt2img", json=BODY)).status_code == 401
        assert (await client.post("/v1/txt2img", json=BODY, headers=key)).status_code == 202
        assert (await client.get("/v1/jobs", headers={"X-API-Key": key["Authorization"][7:]})).status_code == 200
    assert len((await two[0].get("/v1/jobs", headers=key)).json()["data"]) == 2  # none of those made without a key
    revoke_key(redis_client, id_of(key))
    await asyncio.sleep(CACHE_SECONDS)
    for client in two:
        refused = await client.get("/v1/models", headers=key)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert "was revoked" in refused.json()["detail"]
        assert (await client.get("/v1/models")).status_code == 401


async def test_a_damaged_key_is_told_apart(client: httpx.AsyncClient, redis_client: Redis) -> None:
    key = make_key(redis_client)
    refused = await client.get("/v1/models", headers={"Authorization": key["Authorization"][:-1]})
    assert refused.status_code == 401
    assert "not whole" in refused.json()["detail"]
    assert "not whole" not in (await client.get("/v1/models", headers=bearer("something else"))).json()["detail"]
    odd = await client.get("/v1/models", headers={b"X-API-Key": b"dk_\xff\xfe"})
    assert odd.status_code == 401


JOB_ROUTES = {
    ("GET", "/v1/jobs/{job_id}"): Scope.READ,
    ("DELETE", "/v1/jobs/{job_id}"): Scope.SUBMIT,
    ("POST", "/v1/jobs/{job_id}/cancel"): Scope.SUBMIT,
    ("GET", "/v1/jobs/{job_id}/events"): Scope.READ,
}
OTHER_ROUTES = {
    ("POST", "/v1/txt2img"): Scope.SUBMIT,
    ("POST", "/v1/img2img"): Scope.SUBMIT,
    ("POST", "/v1/inpaint"): Scope.SUBMIT,
    ("POST", "/v1/upscale"): Scope.SUBMIT,
    ("GET", "/v1/jobs"): Scope.READ,
    ("GET", "/v1/models"): Scope.READ,
}
OPEN_ROUTES = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics")} | {
    (method, "/v1/images/{key}") for method in ("GET", "HEAD")
}


def test_these_are_all_routes(settings: Settings) -> None:
    """A new route must be added here, so that the tests of this file reach it; the reference tells its scope."""
    paths = create_app(settings).openapi()["paths"]
    routes = {(method.upper(), path): operation for path, by in paths.items() for method, operation in by.items()}
    assert set(routes) == set(JOB_ROUTES) | set(OTHER_ROUTES) | OPEN_ROUTES
    for route, operation in routes.items():
        scope = (JOB_ROUTES | OTHER_ROUTES).get(route)
        named = [scheme for requirement in operation.get("security", []) for scheme in requirement.values()]
        assert named == ([[scope.value]] * 2 if scope else []), route
        assert scope is None or {"401", "403"} <= set(operation["responses"]), route


async def test_a_missing_scope_is_named(client: httpx.AsyncClient, redis_client: Redis) -> None:
    key_with = {scope: make_key(redis_client, scope) for scope in Scope}
    for (method, path), scope in (JOB_ROUTES | OTHER_ROUTES).items():
        other = Scope.READ if scope is Scope.SUBMIT else Scope.SUBMIT
        refused = await client.request(method, path.format(job_id="x"), headers=key_with[other])
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden"), path
        assert f"`{scope}`" in refused.json()["detail"]
        assert f'scope="{scope}"' in refused.headers["www-authenticate"]
        for enough in (scope, Scope.ADMIN):
            allowed = await client.request(method, path.format(job_id="x"), headers=key_with[enough])
            assert allowed.status_code not in (401, 403), path
    for key in ("all", "0123456789abcdef", "anonymous"):
        refused = await client.get("/v1/jobs", params={"key": key}, headers=key_with[Scope.READ])
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert "`admin`" in refused.json()["detail"]


async def test_a_stranger_finds_nothing_and_an_admin_all(
    two: Clients, redis_client: Redis, painter: Any, worker: WorkerBroker
) -> None:
    ann, bob, admin = make_key(redis_client), make_key(redis_client), make_key(redis_client, Scope.ADMIN)
    first, second = two
    done = (await first.post("/v1/txt2img", json=BODY, headers=ann | {"Prefer": "wait"})).json()
    assert done["key"] == id_of(ann)
    painter.stop()
    waits = (await first.post("/v1/txt2img", json=BODY, headers=ann)).json()
    for job in (done, waits):
        for method, path in JOB_ROUTES:
            hidden = await second.request(method, path.format(job_id=job["id"]), headers=bob)
            absent = await second.request(method, path.format(job_id="0" * 32), headers=bob)
            assert (hidden.status_code, hidden.json()["code"]) == (404, "job_not_found"), (method, path)
            assert hidden.json()["detail"].replace(job["id"], "") == absent.json()["detail"].replace("0" * 32, "")
    assert (await second.get("/v1/jobs", headers=bob)).json()["data"] == []
    # The same Idempotency-Key is another one with another key.
    keyed = {"Idempotency-Key": "same"}
    ids = {(await second.post("/v1/txt2img", json=BODY, headers=key | keyed)).json()["id"] for key in (ann, bob)}
    assert len(ids) == 2
    # A picture's URL is its permission, and only who sees the job gets one.
    assert (await second.get(httpx.URL(done["images"][0]["url"]).raw_path.decode())).status_code == 200

    seen = (await second.get(f"/v1/jobs/{done['id']}", headers=admin)).json()
    assert (seen["key"], len(seen["images"])) == (id_of(ann), 1)
    pages = {
        key: {job["id"] for job in (await second.get("/v1/jobs", params=params, headers=admin)).json()["data"]}
        for key, params in ((key, {"key": key}) for key in ("all", id_of(ann), id_of(bob), id_of(admin)))
    }
    assert pages["all"] == {done["id"], waits["id"], *ids}
    assert (len(pages[id_of(ann)]), len(pages[id_of(bob)]), len(pages[id_of(admin)])) == (3, 1, 0)
    assert (await second.get("/v1/jobs", headers=admin)).json()["data"] == []
    assert (await second.get("/v1/jobs", params={"key": id_of(bob)}, headers=bob)).status_code == 200
    cancelled = await second.post(f"/v1/jobs/{waits['id']}/cancel", headers=admin)
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert (await second.delete(f"/v1/jobs/{done['id']}", headers=admin)).status_code == 204
    assert (await first.get(f"/v1/jobs/{done['id']}", headers=ann)).status_code == 404


async def test_keys_of_the_settings_are_no_admins(
    settings: Settings, serving: Serving, worker: WorkerBroker, redis_client: Redis
) -> None:
    """They work beside those in Redis, and see only their own jobs."""
    async with (
        serving(settings.model_copy(update={"api_keys": (SecretStr("of-ann"), SecretStr("of-bob"))})) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        assert (await http.get("/v1/models")).status_code == 401
        job = (await http.post("/v1/txt2img", json=BODY, headers=bearer("of-ann"))).json()
        assert (await http.get(f"/v1/jobs/{job['id']}", headers=bearer("of-bob"))).status_code == 404
        assert (await http.get("/v1/jobs?key=all", headers=bearer("of-bob"))).status_code == 403
        key = make_key(redis_client)
        await asyncio.sleep(CACHE_SECONDS)
        assert (await http.get("/v1/jobs", headers=key)).json()["data"] == []


async def test_answers_say_what_is_left(two: Clients, worker: WorkerBroker, redis_client: Redis) -> None:
    key = make_key(redis_client, rate_per_second=0.001, rate_burst=2, max_waiting=10)
    answers = [await two[i % 2].post("/v1/txt2img", json=BODY, headers=key) for i in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    policy = '"submits";q=2;w=2000, "jobs";q=10;qu="concurrent-requests"'
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {policy}
    left = [re.fullmatch(r'"submits";r=(\d+);t=(\d+), "jobs";r=(\d+)', a.headers["ratelimit"]) for a in answers]
    numbers = [[int(number) for number in found.groups()] for found in left if found]
    assert [(submits, jobs) for submits, _, jobs in numbers] == [(1, 9), (0, 8), (0, 8)]
    assert numbers[0][1] == 1000  # one more in 1000 s
    assert answers[2].json()["code"] == "rate_limited"
    assert int(answers[2].headers["retry-after"]) == numbers[2][1] > 900
    assert "ratelimit" not in (await two[0].get("/v1/jobs", headers=key)).headers
    limit_key(redis_client, id_of(key), OwnLimits(max_waiting=2))
    await asyncio.sleep(CACHE_SECONDS)
    changed = await two[0].post("/v1/txt2img", json=BODY, headers=key)
    assert changed.headers["ratelimit-policy"] == '"submits";q=200;w=4, "jobs";q=2;qu="concurrent-requests"'


async def test_a_full_key_names_its_limit(client: httpx.AsyncClient, worker: WorkerBroker, redis_client: Redis) -> None:
    key = make_key(redis_client, max_waiting=1, rate_per_second=0.5, rate_burst=9)
    answers = [await client.post("/v1/txt2img", json=BODY, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 429]
    assert answers[0].headers["ratelimit"] == '"submits";r=8;t=16, "jobs";r=0'
    assert answers[0].headers["ratelimit-policy"].startswith('"submits";q=9;w=18, ')
    assert answers[1].json()["code"] == "queue_full"
    assert (answers[1].headers["ratelimit"], answers[1].headers["retry-after"]) == ('"submits";r=8, "jobs";r=0', "5")


async def test_a_revoked_key_hears_nothing_more(
    client: httpx.AsyncClient, worker: WorkerBroker, redis_client: Redis
) -> None:
    """A stream of events that was open ends with the next event, which is not told."""
    key = make_key(redis_client)
    job = (await client.post("/v1/txt2img", json=BODY, headers=key)).json()
    (taken,) = worker.take(1)
    events: list[str] = []
    async with client.stream("GET", job["urls"]["events"], headers=key) as stream:
        async for line in stream.aiter_lines():
            if not line.startswith("event: "):
                continue
            events.append(line)
            if len(events) == 1:
                revoke_key(redis_client, id_of(key))
                await asyncio.sleep(CACHE_SECONDS)
                worker.progress(taken, 1, 20)
    assert events == ["event: started"]


async def test_a_key_revoked_while_it_waits_is_not_answered(
    client: httpx.AsyncClient, worker: WorkerBroker, redis_client: Redis
) -> None:
    key = make_key(redis_client)
    waiting = asyncio.create_task(client.post("/v1/txt2img", json=BODY, headers=key | {"Prefer": "wait=2"}))
    taken = False
    while not taken:
        taken = bool(await asyncio.to_thread(worker.take, 1))
    revoke_key(redis_client, id_of(key))
    answer = await waiting
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert "urls" not in answer.text


async def test_known_keys_identify_while_redis_is_away(settings: Settings, serving: Serving) -> None:
    server = EmbeddedValkey()
    server.start()
    away = settings.model_copy(update={"redis_url": server.url, "api_keys": (SecretStr("of-ann"),)})
    with Redis.from_url(server.url) as direct:
        reads = make_key(direct, Scope.READ)
    async with serving(away) as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
        assert (await http.get("/v1/models", headers=reads)).status_code == 200
        server.stop()
        await asyncio.sleep(CACHE_SECONDS)
        assert (await http.get("/v1/models", headers=bearer("of-ann"))).status_code == 503
        assert (await http.get("/v1/models", headers=reads)).status_code == 503
        assert (await http.post("/v1/txt2img", json=BODY, headers=reads)).status_code == 403
        assert (await http.get("/v1/models", headers=bearer("of-eve"))).status_code == 401


@pytest.mark.parametrize(
    ("host", "asked", "allowed"),
    [
        ("127.0.0.1", None, True),
        ("127.9.9.9", None, True),
        ("::1", None, True),
        ("localhost", None, True),
        ("0.0.0.0", None, False),
        ("::", None, False),
        ("10.0.0.7", None, False),
        ("pictures.example", None, False),
        ("127.0.0.1", False, False),
        ("0.0.0.0", True, True),
    ],
)
def test_only_loopback_is_open_unasked(settings: Settings, host: str, asked: bool | None, allowed: bool) -> None:
    heard = settings.model_copy(update={"host": host, "allow_anonymous": asked})
    assert allows_anonymous(heard) is allowed
    if allowed:
        require_keys(heard)
    else:
        with pytest.raises(NoKeysError, match="darkroom keys create"):
            require_keys(heard)


def test_behind_a_proxy_loopback_is_open_to_others_too(settings: Settings) -> None:
    for proxied in ({"public_url": "https://pictures.example"}, {"trusted_proxies": ("127.0.0.1",)}):
        behind = settings.model_copy(update=proxied)
        assert not allows_anonymous(behind)
        with pytest.raises(NoKeysError, match=r"listen on 127\.0\.0\.1 behind a proxy, and there is no API key"):
            require_keys(behind)
        assert allows_anonymous(behind.model_copy(update={"allow_anonymous": True}))


def test_one_key_is_enough_to_listen(settings: Settings, redis_client: Redis) -> None:
    outside = settings.model_copy(update={"host": "0.0.0.0"})
    require_keys(outside.model_copy(update={"api_keys": (SecretStr("key"),)}))
    require_keys(outside.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"}))  # asks for keys later
    key = make_key(redis_client)
    require_keys(outside)
    revoke_key(redis_client, id_of(key))
    with pytest.raises(NoKeysError, match="no API key"):
        require_keys(outside)


async def test_without_redis_and_keys_nobody_comes_in(settings: Settings, serving: Serving) -> None:
    """A gateway that could not ask whether there are keys must not take that for a no."""
    server = EmbeddedValkey()
    server.start()
    server.stop()
    away = settings.model_copy(update={"redis_url": server.url, "allow_anonymous": False})
    async with serving(away) as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
        assert (await http.get("/v1/models", headers=bearer("of-eve"))).status_code == 503
        server.start()
        assert (await http.get("/v1/models", headers=bearer("of-eve"))).status_code == 401
        assert (await http.get("/v1/models")).status_code == 401
    server.stop()


def test_the_command_refuses_to_listen_to_everybody(settings: Settings) -> None:
    given = {"DARKROOM_HOST": "0.0.0.0", "DARKROOM_PORT": "0", "DARKROOM_REDIS_URL": settings.redis_url}
    command = [sys.executable, "-m", "cli.main", "gateway"]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "would listen on 0.0.0.0" in done.stderr
    assert "DARKROOM_ALLOW_ANONYMOUS=true" in done.stderr
    assert "Traceback" not in done.stderr
