"""Half-done pictures go on in another worker, and lack of memory costs time, never a job."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing, closing
from typing import Any

import pytest
import torch

from broker.gateway_side import JobBroker
from broker.supervisor_side import SupervisorBroker
from contract.events import ProgressEvent, StartedEvent
from contract.settings import Settings
from contract.spec import JobSpec
from models.latent_diffusion import LatentDiffusion
from tests.worker.running import SECONDS, StartWorker, ended, slow
from worker.engine import runner
from worker.engine.bank import Bank
from worker.engine.resident import ResidentModel

MakeSpec = Callable[..., JobSpec]
EXACT: dict[str, Any] = {"buckets": (4,), "batching": "exact", "fingerprint": "f"}


async def until_step(gateway: JobBroker, spec: JobSpec, step: int) -> None:
    async with asyncio.timeout(SECONDS), aclosing(gateway.follow(spec.id)) as events:
        async for one in events:
            if isinstance(one.event, ProgressEvent) and one.event.step >= step:
                return


async def steps_of_the_last_execution(gateway: JobBroker, spec: JobSpec) -> list[int]:
    steps: list[int] = []
    async with aclosing(gateway.follow(spec.id)) as events:
        async for one in events:
            if isinstance(one.event, StartedEvent):
                steps = []
            if isinstance(one.event, ProgressEvent):
                steps.append(one.event.step)
    return steps


async def checksums(gateway: JobBroker, spec: JobSpec) -> list[str]:
    record = await ended(gateway, spec)
    assert record.result is not None, record.error
    return [picture.sha256 for picture in record.result.pictures]


async def undisturbed(gateway: JobBroker, start_worker: StartWorker, spec: JobSpec) -> list[str]:
    await gateway.submit(spec)
    worker = start_worker(**EXACT)
    made = await checksums(gateway, spec)
    await asyncio.to_thread(worker.stop)
    return made


@pytest.mark.parametrize("way", ["drained", "reaped"])
async def test_another_execution_goes_on_at_the_same_step_with_the_same_bytes(
    gateway: JobBroker,
    start_worker: StartWorker,
    make_spec: MakeSpec,
    settings: Settings,
    models: Mapping[str, LatentDiffusion],
    way: str,
) -> None:
    fields = {"steps": 60, "eta": 1.0, "n": 2, "prompt": "a cat"}
    expected = await undisturbed(gateway, start_worker, make_spec(**fields))
    spec = make_spec(**fields)
    with slow(models, 0.02):
        first = start_worker(drain_seconds=0.0, resume_seconds=0.05, **EXACT)
        await gateway.submit(spec)
        await until_step(gateway, spec, 20)
        if way == "drained":
            await asyncio.to_thread(first.stop)
            start_worker(**EXACT)
        else:
            with closing(SupervisorBroker(settings)) as broker:
                await asyncio.to_thread(broker.reap_worker, first.worker.broker.name)
    assert await checksums(gateway, spec) == expected
    assert min(await steps_of_the_last_execution(gateway, spec)) > 10


async def test_jobs_outlast_a_lack_of_memory(
    gateway: JobBroker,
    start_worker: StartWorker,
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice, two failures in a row in company: rows are handed back with their states, and come again."""
    fields = [{"steps": 12, "eta": 1.0, "n": 1 + number % 2, "seed": 10 * number} for number in range(4)]
    expected = [await undisturbed(gateway, start_worker, make_spec(**one)) for one in fields]
    step, calls, failures = runner.step, iter(range(10**6)), [5, 5, 15, 15]

    def failing(resident: ResidentModel, bank: Bank, rows: slice) -> None:
        if failures and next(calls) >= failures[0] and bank.active.sum() > 1:
            del failures[0]
            raise torch.OutOfMemoryError("injected")
        step(resident, bank, rows)

    monkeypatch.setattr(runner, "step", failing)
    specs = [make_spec(**one) for one in fields]
    for spec in specs:
        await gateway.submit(spec)
    start_worker(capacity=8, **EXACT)
    assert [await checksums(gateway, spec) for spec in specs] == expected
    assert not failures
