"""Whether a worker's main loop still turns: `/healthz` beside `/metrics`, for whoever restarts stuck processes."""

import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STUCK_SECONDS: Final = 600.0
"""Longer than any tick: eight SDXL pictures on a few cores take minutes per step."""


Check = Callable[[], tuple[bool, str]]
"""Whether all is well, and a line that says why."""


class Pulse:
    """The main loop beats, idle or not; others ask how long ago. Redis and the store do not count: a restart mends
    neither."""

    def __init__(self) -> None:
        self._beaten = time.monotonic()

    def beat(self) -> None:
        self._beaten = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._beaten

    def check(self) -> tuple[bool, str]:
        silent = self.silent_seconds
        return silent < STUCK_SECONDS, f"last turn of the main loop {silent:.1f} s ago"


def serve(registry: CollectorRegistry, check: Check, host: str, port: int) -> int:
    """Answers in threads on /healthz (200, or 503 if not all is well) and on every other path with the metrics.

    Returns the port, which is a free one for port 0."""
    server = make_server(host, port, application(registry, check), _Server, handler_class=_Quiet)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port


def application(registry: CollectorRegistry, check: Check) -> "WSGIApplication":
    show_metrics: WSGIApplication = make_wsgi_app(registry)

    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            return show_metrics(environ, start_response)
        well, why = check()
        status = "200 OK" if well else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
        return [f"{why}\n".encode()]

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that it overrides
        """Probes and scrapes come every few seconds; the log is for jobs."""
