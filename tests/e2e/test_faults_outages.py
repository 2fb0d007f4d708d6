"""Redis, the store or a worker go away for a while, and come back: no job is lost, none ends twice."""

import asyncio
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from benchmarks.crew import Crew
from broker.connection import connect
from broker.gateway_side import JobBroker
from broker.store import Store
from contract.errors import ErrorCode
from contract.spec import JobSpec, JobStatus
from tests.e2e.ends import ended, events, until

MakeSpec = Callable[..., JobSpec]
MakeCrew = Callable[..., AbstractAsyncContextManager[tuple[Crew, JobBroker]]]


async def test_redis_stops_and_starts(make_crew: MakeCrew, make_spec: MakeSpec) -> None:
    """While jobs run, wait and end; for longer than a lease."""
    async with make_crew() as (crew, gateway):
        worker = crew.start()
        specs = [make_spec(steps=steps) for steps in (40, 90, 140, 300)]
        for spec in specs:
            await gateway.submit(spec)
        await until(gateway, specs[1], "progress")
        await asyncio.to_thread(crew.valkey.stop)
        await asyncio.sleep(crew.settings.lease_seconds + 0.5)
        assert worker.said("redis away")
        await asyncio.to_thread(crew.valkey.start)
        for spec in specs:
            assert (await ended(gateway, spec)).status is JobStatus.SUCCEEDED
            assert "queued" not in (await events(gateway, spec))[1:], "the worker that had it went on"
        assert worker.process.poll() is None


async def test_a_worker_started_without_redis_waits_for_it(make_crew: MakeCrew, make_spec: MakeSpec) -> None:
    async with make_crew() as (crew, gateway):
        await asyncio.to_thread(crew.valkey.stop)
        worker = crew.start()
        await asyncio.to_thread(worker.wait_for, "redis away")
        await asyncio.to_thread(crew.valkey.start)
        spec = make_spec()
        await gateway.submit(spec)
        assert (await ended(gateway, spec)).status is JobStatus.SUCCEEDED


async def test_redis_is_full(make_crew: MakeCrew, make_spec: MakeSpec) -> None:
    """For longer than a lease: nothing can be saved, and jobs go on to their ends all the same."""
    async with make_crew(resume_seconds=0.2) as (crew, gateway):
        worker = crew.start()
        specs = [make_spec(steps=steps) for steps in (20, 130)]
        for spec in specs:
            await gateway.submit(spec)
        await until(gateway, specs[1], "progress")
        with connect(crew.settings.redis_url) as client:
            client.config_set("maxmemory", 1)
        await asyncio.to_thread(worker.wait_for, "OOM command not allowed")
        for spec in specs:
            assert (await ended(gateway, spec)).status is JobStatus.SUCCEEDED
            assert "queued" not in (await events(gateway, spec))[1:]
        assert worker.process.poll() is None


def refuse(crew: Crew, spec: JobSpec) -> Path:
    """A file stands where the job's pictures should go."""
    place = crew.folder / "store" / "outputs" / spec.id
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    return place


async def test_a_store_that_refuses_writes_for_a_while_is_outlasted(make_crew: MakeCrew, make_spec: MakeSpec) -> None:
    async with make_crew() as (crew, gateway):
        crew.start()
        refused, cancelled, neighbour = make_spec(n=2), make_spec(), make_spec(steps=6)
        place = refuse(crew, refused)
        refuse(crew, cancelled)
        for spec in (refused, cancelled, neighbour):
            await gateway.submit(spec)
        assert (await ended(gateway, neighbour)).status is JobStatus.SUCCEEDED
        await asyncio.sleep(2 * crew.settings.lease_seconds)
        await gateway.cancel(cancelled.id)
        assert (await ended(gateway, cancelled)).status is JobStatus.CANCELLED
        place.unlink()
        record = await ended(gateway, refused)
        assert record.result is not None, record.error
        assert (await events(gateway, refused)).count("started") == 1
        for picture in record.result.pictures:
            assert len(Store(crew.settings.store_url).get(picture.key)) == picture.bytes


async def test_a_store_that_refuses_for_too_long(make_crew: MakeCrew, make_spec: MakeSpec) -> None:
    async with make_crew(store_patience_seconds=1.0) as (crew, gateway):
        crew.start()
        refused, neighbour = make_spec(), make_spec(steps=6)
        refuse(crew, refused)
        for spec in (refused, neighbour):
            await gateway.submit(spec)
        record = await ended(gateway, refused)
        assert record.error is not None
        assert record.error.code is ErrorCode.STORE_UNAVAILABLE
        assert record.error.detail.endswith("the picture store cannot be reached or refuses; try again later")
        assert (await ended(gateway, neighbour)).status is JobStatus.SUCCEEDED


@pytest.fixture
def small_disk() -> tuple[str, ...]:
    """Before a worker's command: a mount namespace with 64 kB in the folder STORE."""
    if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own")
    script = 'mount -t tmpfs -o size=64k none "$STORE" && exec "$@"'
    return ("unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh")


async def test_the_disk_of_a_local_store_is_full(
    make_crew: MakeCrew, make_spec: MakeSpec, small_disk: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_crew(store_patience_seconds=0.5) as (crew, gateway):
        folder = crew.folder / "store"
        monkeypatch.setenv("STORE", str(folder))
        crew.start(*small_disk)
        large, small = make_spec(width=128, height=128, n=4), make_spec(width=16, height=16)
        await gateway.submit(large)
        record = await ended(gateway, large)
        assert record.error is not None
        assert record.error.code is ErrorCode.STORE_UNAVAILABLE
        assert record.error.detail == (
            "a finished picture could not be stored: the picture store is full; try again later"
        )
        await gateway.submit(small)
        assert (await ended(gateway, small)).status is JobStatus.SUCCEEDED


async def test_a_frozen_worker_wakes_after_its_lease(make_crew: MakeCrew, make_spec: MakeSpec) -> None:
    """Its jobs went on elsewhere; what it still does to them is thrown away."""
    async with make_crew() as (crew, gateway):
        workers = [crew.start(), crew.start()]
        for worker in workers:
            await asyncio.to_thread(worker.wait_for, "worker ready")
        specs = [make_spec(steps=steps) for steps in (80, 81)]
        for spec in specs:
            await gateway.submit(spec)
        await until(gateway, specs[0], "progress")
        frozen = next(worker for worker in workers if worker.said(f"job={specs[0].id} "))
        theirs = [spec for spec in specs if frozen.said(f"job={spec.id} ")]
        frozen.send(signal.SIGSTOP)
        records = [await ended(gateway, spec) for spec in specs]
        for spec, record in zip(specs, records, strict=True):
            assert record.status is JobStatus.SUCCEEDED
            assert (await events(gateway, spec)).count("started") == (2 if spec in theirs else 1)
        frozen.send(signal.SIGCONT)
        after = make_spec()
        await gateway.submit(after)
        assert (await ended(gateway, after)).status is JobStatus.SUCCEEDED
        await asyncio.sleep(1.0)
        assert [await ended(gateway, spec) for spec in specs] == records
        assert frozen.process.poll() is None
