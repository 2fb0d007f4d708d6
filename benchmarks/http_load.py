"""A light HTTP client for load: keep-alive connections that send ready-made bytes, so that the server is what is
measured and not the client."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import urlsplit

_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = b"\r\ncontent-length:"
_PATIENCE_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """`head` is the status line and the headers in lower case; `seconds` from the first byte sent to the last read."""

    status: int
    head: bytes
    body: bytes
    seconds: float


def post_bytes(url: str, path: str, document: Any) -> bytes:
    """A whole POST request with a JSON body."""
    body = json.dumps(document).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One request at a time. Raises `ConnectionError` where the server hangs up."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer: asyncio.Future[tuple[bytes, bytes]] | None = None

    @classmethod
    async def open(cls, url: str) -> "Connection":
        parts = urlsplit(url)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"{url!r} names no host and port; expected http://host:port")
        _, connection = await asyncio.get_running_loop().create_connection(cls, parts.hostname, parts.port)
        return connection

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def send(self, request: bytes) -> Answer:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        begun = time.perf_counter()
        self._transport.write(request)
        async with asyncio.timeout(_PATIENCE_SECONDS):
            head, body = await self._answer
        return Answer(int(head[9:12]), head, body, time.perf_counter() - begun)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of no kin to it

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(_HEAD_END)
        if end < 0:
            return
        head = self._buffer[:end].lower()
        begin = head.find(_LENGTH)
        size = int(head[begin + len(_LENGTH) :].split(b"\r\n", 1)[0]) if begin >= 0 else 0
        whole = end + len(_HEAD_END) + size
        if len(self._buffer) >= whole and self._answer is not None and not self._answer.done():
            body, self._buffer = self._buffer[end + len(_HEAD_END) : whole], self._buffer[whole:]
            self._answer.set_result((head, body))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the server closed the connection"))


async def as_fast_as_answered(
    url: str, connections: int, requests: int, make: Callable[[int], bytes]
) -> tuple[float, list[Answer]]:
    """Seconds for `requests` requests over so many connections, each of which sends the next one when it has been
    answered; and the answers. `make` gives request number i."""
    opened = await asyncio.gather(*(Connection.open(url) for _ in range(connections)))
    ready = [make(index) for index in range(requests)]
    answers: list[Answer] = []

    async def drive(connection: Connection, mine: Sequence[bytes]) -> None:
        answers.extend([await connection.send(request) for request in mine])

    begun = time.perf_counter()
    await asyncio.gather(*(drive(one, ready[index::connections]) for index, one in enumerate(opened)))
    seconds = time.perf_counter() - begun
    for connection in opened:
        connection.close()
    return seconds, answers
