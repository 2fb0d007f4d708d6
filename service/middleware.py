"""Around every request, as plain ASGI: its id, its size limit, its figures, its headers and one line in the log."""

import re
import time
from typing import Final
from uuid import uuid4

import structlog
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contract.errors import ErrorCode
from service.metrics import GatewayMetrics
from service.problems import PROBLEM_SCOPE_KEY, REQUEST_ID_SCOPE_KEY, ProblemError, answer

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
DEFAULT_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),  # answers hold signed URLs
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class RequestContext:
    """Gives the request its id (the client's, if it is a sane one); counts and logs the answer; adds headers.

    What routes bind with `structlog.contextvars.bind_contextvars` (key, job) stands in the request's line as well.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._log = structlog.get_logger("darkroom.http").bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope[REQUEST_ID_SCOPE_KEY] = _request_id(scope)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        begun = answered = time.perf_counter()
        status = 500  # of a request that raises before it answers

        async def send_with_headers(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], time.perf_counter()
                headers = list(message.get("headers", ()))
                present = {name for name, _ in headers}
                headers += [header for header in DEFAULT_HEADERS if header[0] not in present]
                headers.append((b"x-request-id", request_id.encode()))
                message["headers"] = headers
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            ended = time.perf_counter()
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            seconds = (answered if answered > begun else ended) - begun
            self._metrics.count(method, route, status, seconds, scope.get(PROBLEM_SCOPE_KEY))
            self._log.info("request", method=method, route=route, status=status, seconds=round(ended - begun, 4))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            asked: str = value.decode("latin-1")
            return asked if _REQUEST_ID.fullmatch(asked) else uuid4().hex
    return uuid4().hex


class ProxyPrefix:
    """Paths may begin with the prefix under which a proxy shows this server, or not: some proxies take it off."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._prefix  # routes compare what comes after it, where it is there
        await self._app(scope, receive, send)


class Defects:
    """An error that nobody expected: the log gets its traceback, the client the id to ask about."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._log = structlog.get_logger("darkroom.http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception:
            if begun:  # too late for a problem: the server logs it and cuts the answer short
                raise
            self._log.exception("defect")
            response = answer(Request(scope), ErrorCode.INTERNAL, "unexpected error; tell the operator the request id")
            await response(scope, receive, send)


class BodyLimit:
    """Refuses by Content-Length before a byte is read, and counts what is streamed without one."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            response = answer(Request(scope), ErrorCode.BODY_TOO_LARGE, self._detail(f"{int(declared):,}"))
            await response(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise ProblemError(ErrorCode.BODY_TOO_LARGE, self._detail(f"more than {self._max_bytes:,}"))
            return message

        await self._app(scope, receive_counted, send)

    def _detail(self, size: str) -> str:
        return f"the body has {size} bytes; expected at most {self._max_bytes:,}: send smaller pictures"
