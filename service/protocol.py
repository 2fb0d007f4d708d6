"""What never becomes a request: a head that is too large or too slow, a line that is no HTTP. All are problems too."""

from asyncio import TimerHandle, Transport
from typing import Any, Final, NoReturn
from uuid import uuid4

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from contract.errors import ErrorCode
from service.middleware import DEFAULT_HEADERS
from service.problems import PROBLEM_TYPE, problem_json, problem_of

MAX_URL_BYTES: Final = 8 * 1024
MAX_HEAD_BYTES: Final = 32 * 1024
HEAD_SECONDS: Final = 30.0
_LINGER_SECONDS: Final = 1.0
_log = structlog.get_logger("darkroom.http")


class GatewayProtocol(HttpToolsProtocol):
    """uvicorn's own parser keeps a head of any size in memory, and waits for it for ever; this one stops reading at
    `MAX_HEAD_BYTES`, and after `HEAD_SECONDS`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = self._only_head = True  # of the latest piece: none of it was body
        self._head_bytes = 0
        self._refused = False
        self._refusal: tuple[ErrorCode, str] | None = None
        self._head_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._only_head = self._in_head
        super().data_received(data)
        if self._only_head and self.parser is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refusal = _HEAD_TOO_LARGE
                self.send_400_response("")
            elif self._head_timer is None:
                self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = self._only_head = False
        self._head_bytes = 0
        self._stop_head_timer()
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(_URL_TOO_LONG)
        if sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse(_HEAD_TOO_LARGE)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_overdue)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # what came belongs to the next request: this one's answer is still under way
        elif self._head_bytes:
            self._refusal = _HEAD_TOO_SLOW
            self.send_400_response("")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called for whatever cannot be parsed, our own refusals included; the connection ends with it."""
        self._refused = True
        self._stop_head_timer()
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self.cycle.keep_alive = False  # an answer to what came before is under way, and is the last one
            return
        code, detail = self._refusal or (ErrorCode.MALFORMED_HTTP, "expected a request as RFC 9112 has it")
        request_id = uuid4().hex
        _log.warning("request refused", code=code.value, status=code.status, request_id=request_id)
        content = problem_json(problem_of(code, detail, request_id=request_id))
        usual = "".join(f"{name.decode()}: {value.decode()}\r\n" for name, value in DEFAULT_HEADERS)
        head = (
            f"content-type: {PROBLEM_TYPE}\r\ncontent-length: {len(content)}\r\nx-request-id: {request_id}\r\n{usual}"
            "connection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[code.status] + head.encode() + content)
        # To close with something unread would reset the connection, and the answer might never be seen.
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _refuse(self, refusal: tuple[ErrorCode, str]) -> NoReturn:
        """Out of the parser's callback, by the way that uvicorn takes for a line that is no HTTP."""
        self._refusal = refusal
        raise httptools.HttpParserError(refusal[1])


_URL_TOO_LONG: Final = (ErrorCode.URL_TOO_LONG, f"expected at most {MAX_URL_BYTES:,} bytes of path and query")
_HEAD_TOO_SLOW: Final = (ErrorCode.REQUEST_TIMEOUT, f"expected the headers within {HEAD_SECONDS:g} s")
_HEAD_TOO_LARGE: Final = (ErrorCode.HEADERS_TOO_LARGE, f"expected at most {MAX_HEAD_BYTES:,} bytes of headers")
