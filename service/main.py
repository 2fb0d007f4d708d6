"""The gateway's process: one event loop, on the address of the settings, until SIGTERM or SIGINT."""

import gc
import resource
import signal
import sys
from contextlib import suppress
from socket import socket
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from broker.store import Store, StoreRefusedError
from contract.log import configure_log
from contract.settings import Settings
from service.app import create_app, open_store
from service.auth_keys import NoKeysError, require_keys
from service.protocol import GatewayProtocol

_PARTING_SECONDS: Final = 5
_COLLECT_AFTER: Final = 20_000  # new objects: those of a few requests at once, not of each


class GatewayServer(uvicorn.Server):
    """Uvicorn waits for open answers when it stops; this one tells streams of events to end, or they never would.

    Their clients come back by themselves, to another gateway or to this one's successor.
    """

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        app.state.gateway.closing.set()
        await super().shutdown(sockets)


def server_config(settings: Settings, store: Store | None = None, **changes: Any) -> uvicorn.Config:
    """How the gateway is served; `changes` are uvicorn's own options."""
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "loop": "uvloop",
        "http": GatewayProtocol,
        "ws": "none",
        "log_config": None,  # `configure_log` covers uvicorn's loggers
        "access_log": False,  # the app logs requests itself, without their prompts
        "server_header": False,
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": list(settings.trusted_proxies),
        "timeout_graceful_shutdown": _PARTING_SECONDS,
    }
    return uvicorn.Config(create_app(settings, store), **options | changes)


def main(settings: Settings) -> None:
    """Returns once the server has stopped; answers that are under way are finished first."""
    configure_log(settings.log_format)
    try:
        require_keys(settings)
        store = open_store(settings)
    except (NoKeysError, StoreRefusedError) as error:
        raise SystemExit(str(error)) from error
    _allow_files()
    server = GatewayServer(server_config(settings, store))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn passes the signal on once it has stopped
    gc.freeze()  # what was built up to here lives as long as the process: the collector need not look at it again
    gc.set_threshold(_COLLECT_AFTER)
    with suppress(KeyboardInterrupt):  # the same, for Ctrl-C
        server.run()
    if not server.started:
        raise SystemExit(3)  # uvicorn has told why


def _allow_files() -> None:
    """As many as the system lets us have: every connection is one, and event streams soon hold the usual 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # the limit may be "any number" on systems that then allow less, like macOS
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
