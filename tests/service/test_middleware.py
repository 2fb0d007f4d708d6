"""What stands around every answer: headers, ids, problems for what no route answers."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from broker.gateway_side import JobBroker
from broker.worker_side import WorkerBroker
from contract.settings import Settings
from service.middleware import DEFAULT_HEADERS, Defects
from service.protocol import MAX_HEAD_BYTES, MAX_URL_BYTES

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]
ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


async def test_every_answer_has_the_headers(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    for answer in (
        await client.get("/healthz"),
        await client.post("/v1/txt2img", json={"prompt": "a pizza"}),
        await client.post("/v1/txt2img", json={}),
        await client.get("/no/such/place"),
        await client.put("/healthz"),
        await client.get("/v1/jobs/none"),
    ):
        assert ALWAYS.items() <= dict(answer.headers).items()
        assert answer.headers["x-request-id"]


async def test_unknown_addresses(client: httpx.AsyncClient) -> None:
    for path in ("/", "/v1", "/v1/", "/v1/txt2img/", "/v1/jobs/", "/../etc/passwd", "/v1/models/%00"):
        problem(await client.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/txt2img", "POST"),
        ("PUT", "/v1/jobs/some", "DELETE, GET"),
        ("DELETE", "/v1/models", "GET"),
        ("OPTIONS", "/v1/txt2img", "POST"),
    ],
)
async def test_methods_that_an_address_does_not_take(
    client: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert path in problem(answer, 405, "method_not_allowed")["detail"]
    assert answer.headers["allow"] == allowed


async def test_bodies_beyond_the_limit(settings: Settings, serving: Serving, worker: WorkerBroker) -> None:
    async def chunks() -> Any:
        for _ in range(5):
            yield b"x" * 1000

    small = settings.model_copy(update={"max_body_bytes": 4096})
    async with serving(small) as url, httpx.AsyncClient(base_url=url) as http:
        kind = {"Content-Type": "application/json"}
        declared = await http.post("/v1/txt2img", content=b"x" * 5000, headers=kind)
        streamed = await http.post("/v1/txt2img", content=chunks(), headers=kind)
    for answer in (declared, streamed):
        assert "expected at most 4,096" in problem(answer, 413, "body_too_large")["detail"]


async def test_a_defect_is_a_problem_like_the_others(
    settings: Settings, serving: Serving, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(self: JobBroker) -> None:
        raise RuntimeError("what went wrong")

    monkeypatch.setattr(JobBroker, "cards", broken)
    async with serving(settings) as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.get("/v1/models", headers={"X-Request-ID": "asked-for"})
    assert "what went wrong" not in answer.text
    assert problem(answer, 500, "internal")["request_id"] == "asked-for"
    assert ALWAYS.items() <= dict(answer.headers).items()
    logged = capsys.readouterr().out
    assert "RuntimeError: what went wrong" in logged
    assert "asked-for" in next(line for line in logged.splitlines() if "defect" in line)


async def test_an_answer_that_breaks_halfway_is_cut_short() -> None:
    """Nothing can be added to it; the server ends the connection."""
    sent = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("halfway")

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    with pytest.raises(RuntimeError, match="halfway"):
        await Defects(app)({"type": "http"}, receive, send)
    assert sent == ["http.response.start"]


async def talk(url: str, *pieces: bytes) -> tuple[int, bytes, Any]:
    """Sends raw bytes until the server has answered and hung up: status, head and body of its last answer."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
    except ConnectionError:
        pass
    *_, answer = (await asyncio.wait_for(reader.read(), 10)).split(b"HTTP/1.1 ")
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[0]), head.lower(), json.loads(body)


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        pytest.param([b"hello, is this a telephone?\r\n\r\n"], 400, "malformed_http", id="no HTTP"),
        pytest.param([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], 400, "malformed_http", id="TLS"),
        pytest.param([GET + b"Content-Length: many\r\n\r\n"], 400, "malformed_http", id="odd length"),
        pytest.param(
            [GET + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
            400,
            "malformed_http",
            id="two lengths",
        ),
        pytest.param([b"GET /" + b"a" * MAX_URL_BYTES + b" HTTP/1.1\r\n\r\n"], 414, "url_too_long", id="long URL"),
        pytest.param(
            [GET + b"X-Much: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n"], 431, "headers_too_large", id="one long header"
        ),
        pytest.param([GET + b"X-Some: a\r\n" * 4000 + b"\r\n"], 431, "headers_too_large", id="many headers"),
        pytest.param([GET, *[b"X-Drop: " + b"a" * 4096] * 40], 431, "headers_too_large", id="a head without end"),
    ],
)
async def test_what_is_no_request_is_a_problem(url: str, pieces: list[bytes], status: int, code: str) -> None:
    got, head, body = await talk(url, *pieces)
    assert (got, body["status"], body["code"]) == (status, status, code)
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    assert b"x-request-id: " + body["request_id"].encode() in head
    for name, value in DEFAULT_HEADERS:
        assert name + b": " + value.lower() in head


async def test_heads_below_the_limit_pass_again_and_again(url: str) -> None:
    """What one request sends does not count for the next one on its connection, nor does a body."""
    heavy = GET + b"X-Much: " + b"a" * (MAX_HEAD_BYTES - 1000) + b"\r\nContent-Length: 100000\r\n"
    head, body = heavy + b"\r\n", b"b" * 100_000
    status, _, answered = await talk(url, head, body, head, body, heavy + b"Connection: close\r\n\r\n", body)
    assert status == 200
    assert answered == {"status": "ok"}
