"""The gateway's process: one event loop, on the address of the settings, until SIGTERM or SIGINT."""

from contextlib import suppress
from socket import socket
from typing import Final

import uvicorn
from fastapi import FastAPI

from contract.settings import Settings
from service.app import create_app
from service.auth_keys import NoKeysError, require_keys

_PARTING_SECONDS: Final = 5


class GatewayServer(uvicorn.Server):
    """Uvicorn waits for open answers when it stops; this one tells streams of events to end, or they never would.

    Their clients come back by themselves, to another gateway or to this one's successor.
    """

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        app.state.gateway.closing.set()
        await super().shutdown(sockets)


def main(settings: Settings) -> None:
    """Returns once the server has stopped; answers that are under way are finished first."""
    try:
        require_keys(settings)
    except NoKeysError as error:
        raise SystemExit(str(error)) from error
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        access_log=False,  # the app logs requests itself, without their prompts
        server_header=False,
        timeout_graceful_shutdown=_PARTING_SECONDS,
    )
    server = GatewayServer(config)
    with suppress(KeyboardInterrupt):  # uvicorn has stopped already, and passes the signal on
        server.run()
    if not server.started:
        raise SystemExit(3)  # uvicorn has told why
