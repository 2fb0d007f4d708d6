"""`Prefer: wait`: an answer that is held back until the job has ended (RFC 7240)."""

import asyncio
import re
from collections.abc import Sequence
from typing import Final

from fastapi import Request

from service.state import GatewayState

# RFC 7240, section 2: token [= value] and parameters, parted by commas; commas may stand inside quotes.
_VALUE: Final = r'(?:"(?:[^"\\]|\\.)*"|[^\s",;]*)'
_PREFERENCE: Final = re.compile(
    rf"\s*([\w!#$%&'*+.^`|~-]+)\s*(?:=\s*({_VALUE}))?\s*((?:;[^,\"]*(?:\"[^\"]*\"[^,\"]*)*)?)(?:,|$)"
)
_SECONDS: Final = re.compile(r"[0-9]{1,6}", re.ASCII)


def preferences(prefer: Sequence[str]) -> dict[str, str]:
    """What all lines of the header ask for, by lower-case name; of a repeated one the first counts. What is not
    written as it should be is left out, as the RFC has it."""
    asked: dict[str, str] = {}
    text, place = ",".join(prefer), 0
    while place < len(text):
        found = _PREFERENCE.match(text, place)
        if found is None:
            place = text.find(",", place) + 1 or len(text)
            continue
        asked.setdefault(found[1].lower(), (found[2] or "").strip('"'))
        place = found.end()
    return asked


def seconds_to_wait(prefer: Sequence[str], most: float) -> float | None:
    """What `wait[=seconds]` asks for, at most `most`; None: not to wait, or not to be understood."""
    value = preferences(prefer).get("wait")
    if value == "":
        return most
    return min(float(value), most) if value is not None and _SECONDS.fullmatch(value) else None


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
