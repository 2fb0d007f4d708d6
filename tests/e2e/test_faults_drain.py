"""Workers told to stop: what they have not finished goes on elsewhere, from the step that it has reached."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing

from benchmarks.crew import Crew
from broker.gateway_side import JobBroker
from broker.jobs import JobRecord
from broker.store import Store
from contract.events import ProgressEvent
from contract.spec import JobSpec, JobStatus
from tests.e2e.ends import ended, until

STEP = 40
MakeSpec = Callable[..., JobSpec]
MakeCrew = Callable[..., AbstractAsyncContextManager[tuple[Crew, JobBroker]]]


async def first_steps(gateway: JobBroker, spec: JobSpec) -> list[int]:
    """The first progress that each execution of an ended job told."""
    steps: list[int] = []
    fresh = False
    async with aclosing(gateway.follow(spec.id)) as streamed:
        async for one in streamed:
            fresh = fresh or one.event.type == "started"
            if isinstance(one.event, ProgressEvent) and fresh:
                steps.append(one.event.step)
                fresh = False
    return steps


def pictures(crew: Crew, record: JobRecord) -> list[bytes]:
    assert record.result is not None, record.error
    store = Store(crew.settings.store_url)
    return [store.get(picture.key) for picture in record.result.pictures]


async def test_sigterm_finishes_what_it_can_and_hands_the_rest_back(make_crew: MakeCrew, make_spec: MakeSpec) -> None:
    async with make_crew(drain_seconds=3.0) as (crew, gateway):
        worker = crew.start()
        short, long = make_spec(steps=20), make_spec(steps=240, n=2, eta=0.5)
        for spec in (long, short):
            await gateway.submit(spec)
        await until(gateway, short, "progress")
        await until(gateway, long, "progress")
        worker.send(signal.SIGTERM)
        assert (await ended(gateway, short)).status is JobStatus.SUCCEEDED
        assert await asyncio.to_thread(worker.wait) == 0
        record = await gateway.get(long.id)
        assert record is not None
        assert record.status is JobStatus.QUEUED
        crew.start()
        again = make_spec(**long.model_dump(exclude={"id"}))
        assert pictures(crew, await ended(gateway, long)) == await fault_free(crew, gateway, again)
        first, second = await first_steps(gateway, long)
        assert second > first + STEP


async def fault_free(crew: Crew, gateway: JobBroker, spec: JobSpec) -> list[bytes]:
    await gateway.submit(spec)
    return pictures(crew, await ended(gateway, spec))


async def test_a_second_signal_hands_everything_back_at_once(make_crew: MakeCrew, make_spec: MakeSpec) -> None:
    """Through the supervisor."""
    async with make_crew(drain_seconds=600.0) as (crew, gateway):
        supervisor = crew.supervise(workers=1)
        spec = make_spec(steps=1000)
        await gateway.submit(spec)
        await until(gateway, spec, "progress", STEP)
        supervisor.send(signal.SIGTERM)
        await asyncio.sleep(1.0)
        assert supervisor.process.poll() is None
        supervisor.send(signal.SIGTERM)
        assert await asyncio.to_thread(supervisor.wait) == 0
        record = await gateway.get(spec.id)
        assert record is not None
        assert record.status is JobStatus.QUEUED
        crew.start()
        await until(gateway, spec, "started", times=2)
        await until(gateway, spec, "progress", STEP)
        await gateway.cancel(spec.id)
        await ended(gateway, spec)
        assert (await first_steps(gateway, spec))[1] > STEP
