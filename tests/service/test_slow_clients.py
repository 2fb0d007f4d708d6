"""Clients that never finish: they are told, and hold neither a connection nor memory for ever."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlsplit

import pytest

from broker.worker_side import WorkerBroker
from contract.settings import Settings
from service import body, protocol

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]
SOON = 0.2
HEAD = b"POST /v1/txt2img HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
async def url(settings: Settings, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", SOON)
    monkeypatch.setattr(body, "BODY_SECONDS", SOON)
    async with serving(settings) as served:
        yield served


async def answers_to(url: str, *pieces: bytes) -> bytes:
    """What the server says until it hangs up; the client itself never does."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.01)
    said = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return said


def problem_in(answer: bytes) -> tuple[int, bytes, dict[str, Any]]:
    head, _, document = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), head.lower(), json.loads(document)


@pytest.mark.parametrize("pieces", [[b"GET /healthz HT"], [GET[:-2]], [GET[:9], GET[9:20], GET[20:30]]])
async def test_a_head_that_does_not_end(url: str, pieces: list[bytes]) -> None:
    status, head, document = problem_in(await answers_to(url, *pieces))
    assert (status, document["code"]) == (408, "request_timeout")
    assert b"connection: close" in head


async def test_a_connection_that_says_nothing(url: str) -> None:
    assert await answers_to(url) == b""


async def test_a_later_head_that_does_not_end(url: str) -> None:
    first, _, second = (await answers_to(url, GET, GET[:20])).removeprefix(b"HTTP/1.1 ").partition(b"HTTP/1.1 ")
    assert first.startswith(b"200 ")
    assert second.startswith(b"408 ")


async def test_a_body_that_does_not_end(url: str) -> None:
    status, head, document = problem_in(await answers_to(url, HEAD, b'{"prompt": '))
    assert (status, document["code"]) == (408, "request_timeout")
    assert b"connection: close" in head


@pytest.mark.parametrize(
    ("following", "statuses"),
    [
        pytest.param(GET[:20], [b"202 ", b"408 "], id="too slow"),
        pytest.param(b"hello, is this a telephone?\r\n\r\n", [b"202 "], id="no HTTP"),
        pytest.param(b"GET /" + b"a" * protocol.MAX_URL_BYTES + b" HTTP/1.1\r\n\r\n", [b"202 "], id="long URL"),
    ],
)
async def test_a_slow_answer_is_not_cut_short(
    url: str, worker: WorkerBroker, following: bytes, statuses: list[bytes]
) -> None:
    """Its client waits, and has begun to send the next request. What is no request ends the connection after it."""
    request = json.dumps({"prompt": "a pizza"}).encode()
    waiting = HEAD.replace(b"100", b"%d" % len(request)).replace(b"\r\n\r\n", b"\r\nPrefer: wait=1\r\n\r\n") + request
    answer = await answers_to(url, waiting, following)
    assert [part[:4] for part in answer.split(b"HTTP/1.1 ")] == [b"", *statuses]
