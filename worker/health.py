"""Whether a worker's main loop still turns: `/healthz` beside `/metrics`, for whoever restarts stuck processes."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STUCK_SECONDS: Final = 600.0
"""Longer than any tick: eight SDXL pictures on a few cores take minutes per step."""
HOPELESS_SECONDS: Final = 3600.0
_PATIENCE_SECONDS: Final = 10.0

_log = structlog.get_logger("darkroom.worker")

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


def end_when_hopeless(pulse: Pulse) -> None:
    """For a thread of its own: ends the process once its main loop has stood still for `HOPELESS_SECONDS`, as it does
    over a GPU that hangs, where nobody else does. Till then other threads renew the leases of jobs that never end."""
    while (left := HOPELESS_SECONDS - pulse.silent_seconds) > 0:
        time.sleep(left)
    _log.critical("stuck: the process ends, its jobs go back", silent_seconds=round(pulse.silent_seconds, 1))
    os._exit(1)


def serve(registry: CollectorRegistry, check: Check, host: str, port: int) -> int:
    """Answers in threads on /healthz (200, or 503 if not all is well) and on every other path with the metrics.

    Returns the port, which is a free one for port 0. Raises OSError where it cannot be had."""
    kind = _Server6 if ":" in host else _Server
    server = make_server(host, port, application(registry, check), kind, handler_class=_Quiet)
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


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    timeout = _PATIENCE_SECONDS  # with whoever connects and asks nothing

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that it overrides
        """Probes and scrapes come every few seconds; the log is for jobs."""
