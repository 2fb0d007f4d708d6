"""What tests ask of a job's life."""

import asyncio
from contextlib import aclosing
from typing import Final

from broker.gateway_side import JobBroker
from broker.jobs import JobRecord
from contract.spec import JobSpec

SECONDS: Final = 90.0


async def ended(gateway: JobBroker, spec: JobSpec) -> JobRecord:
    """Waits for the job's end and checks that it ended once."""
    record = await gateway.wait(spec.id, SECONDS)
    assert record is not None
    assert record.status.ended, f"{spec.id} is still {record.status}"
    ends = [one for one in await events(gateway, spec) if one in ("succeeded", "failed", "cancelled")]
    assert ends == [record.status.value]
    return record


async def events(gateway: JobBroker, spec: JobSpec) -> list[str]:
    """The types of all events of a job that has ended."""
    async with asyncio.timeout(SECONDS), aclosing(gateway.follow(spec.id)) as streamed:
        return [one.event.type async for one in streamed]


async def until(gateway: JobBroker, spec: JobSpec, event_type: str, step: int = 0, times: int = 1) -> None:
    """The job has told so many such events, of that step or a later one."""
    async with asyncio.timeout(SECONDS), aclosing(gateway.follow(spec.id)) as streamed:
        async for one in streamed:
            times -= one.event.type == event_type and getattr(one.event, "step", step) >= step
            if not times:
                return
