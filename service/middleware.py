"""Around every request, as plain ASGI: its id, its size limit, its figures, its headers and one line in the log."""

import re
import time
from typing import Final
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contract.errors import ErrorCode
from service.metrics import GatewayMetrics
from service.problems import REQUEST_ID_SCOPE_KEY, ProblemError, answer

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LOCKED_DOWN: Final = "default-src 'none'; frame-ancestors 'none'"


class RequestContext:
    """Gives the request its id (the client's, if it is a sane one); counts and logs the answer; adds headers."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._log = structlog.get_logger("darkroom.http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid4().hex
        scope[REQUEST_ID_SCOPE_KEY] = request_id
        started = time.perf_counter()
        status = 500  # of a request that raises before it answers

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(MutableHeaders(scope=message), request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._report(scope, request_id, status, time.perf_counter() - started)

    def _report(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._metrics.count(method, route, status, seconds)
        self._log.info(
            "request", method=method, route=route, status=status, seconds=round(seconds, 4), request_id=request_id
        )


def _add_headers(headers: MutableHeaders, request_id: str) -> None:
    headers["X-Request-ID"] = request_id
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers.setdefault("Cache-Control", "no-store")  # answers hold signed URLs
    headers.setdefault("Content-Security-Policy", _LOCKED_DOWN)


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
