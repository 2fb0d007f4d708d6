"""`Prefer: wait`: an answer that is held back until the job has ended (RFC 7240)."""

import asyncio
import re
from typing import Final

from fastapi import Request

from service.state import GatewayState

_WAIT: Final = re.compile(r'(?:^|[\s,;])wait(?:\s*=\s*"?([0-9]{1,6})"?)?\s*(?:$|[,;])', re.IGNORECASE)


def seconds_to_wait(prefer: str | None, most: float) -> float | None:
    """What `wait[=seconds]` asks for, at most `most`; None: not to wait, or not to be understood."""
    found = _WAIT.search(prefer or "")
    if found is None:
        return None
    return min(float(found.group(1)), most) if found.group(1) else most


async def wait_for_end(request: Request, state: GatewayState, job_id: str, seconds: float, cancel: bool) -> None:
    """Until the job has ended, `seconds` have passed, the server stops or the client has left; with `cancel`, the last
    cancels the job."""
    waiting = asyncio.create_task(state.broker.wait(job_id, seconds))
    leaving = asyncio.create_task(_client_leaves(request))
    closing = asyncio.create_task(state.closing.wait())
    try:
        await asyncio.wait((waiting, leaving, closing), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            waiting.result()  # raises what it met
        elif leaving.done() and cancel:
            await state.broker.cancel(job_id)
    finally:
        for task in (waiting, leaving, closing):
            task.cancel()
        await asyncio.gather(waiting, leaving, closing, return_exceptions=True)


async def _client_leaves(request: Request) -> None:
    """The body has been read, so the only message to come is the disconnect."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
