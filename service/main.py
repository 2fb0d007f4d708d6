"""The gateway's process: one event loop, on the address of the settings, until SIGTERM or SIGINT."""

from typing import Final

import uvicorn

from contract.settings import Settings
from service.app import create_app

# Streams of events never end by themselves; their clients come back to another gateway, or to this one's successor.
_PARTING_SECONDS: Final = 3


def main(settings: Settings) -> None:
    """Returns once the server has stopped; answers that are under way are finished first."""
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        access_log=False,  # the app logs requests itself, without their prompts
        server_header=False,
        timeout_graceful_shutdown=_PARTING_SECONDS,
    )
