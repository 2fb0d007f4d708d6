"""How soon the job of a killed worker goes on, with the default leases: tiny model, one thread per worker."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Final, Literal
from uuid import uuid4

from benchmarks.chaos_round import working
from benchmarks.crew import Crew, CrewMember
from broker.gateway_side import JobBroker
from contract.events import ProgressEvent, StartedEvent
from contract.spec import JobSpec, Task
from tests.tiny_models import BASE, save_tiny_models
from worker.supervisor import worker_command

RUNS_AGAIN: Final = "runs again elsewhere, without a supervisor"
IS_BACK: Final = "is back in its queue, with a supervisor"
_END_SECONDS: Final = 30.0


async def recovery_seconds(folder: Path, kills: int) -> dict[str, list[float]]:
    """From kill -9 to the event that tells of it, `kills` times each; without a supervisor at moments that are spread
    over the time between two heartbeats, from which the lease counts."""
    save_tiny_models(folder / "models")
    command = worker_command([BASE], folder / "models")
    return {
        RUNS_AGAIN: await _without_supervisor(Crew(folder / "alone", command), kills),
        IS_BACK: await _with_supervisor(Crew(folder / "watched", command), kills),
    }


async def _without_supervisor(crew: Crew, kills: int) -> list[float]:
    members: dict[str, CrewMember] = {}
    seconds = []
    with crew:
        gateway = JobBroker(crew.settings)
        for number in range(kills):
            while len(members) < 2:
                member = crew.start()
                await asyncio.to_thread(member.wait_for, "worker ready")
                members[member.name] = member
            moment = (1 + number / kills) * crew.settings.heartbeat_seconds
            seconds.append(
                await _seconds(gateway, moment, lambda worker: members.pop(worker).send(signal.SIGKILL), "started")
            )
        await gateway.close()
    return seconds


async def _with_supervisor(crew: Crew, kills: int) -> list[float]:
    seconds = []
    with crew:
        gateway = JobBroker(crew.settings)
        supervisor = crew.supervise(1, healthy_seconds=1.0)
        for _ in range(kills):
            (pid,) = await asyncio.to_thread(working, supervisor)
            seconds.append(await _seconds(gateway, 0.0, partial(_kill, pid), "queued"))
        await gateway.close()
    return seconds


def _kill(pid: int, worker: str) -> None:
    del worker
    os.kill(pid, signal.SIGKILL)


async def _seconds(
    gateway: JobBroker, moment: float, kill: Callable[[str], None], then: Literal["started", "queued"]
) -> float:
    """`kill` gets the name of the worker that runs the job; it is called `moment` seconds after the first step."""
    spec = JobSpec(
        id=uuid4().hex, task=Task.TXT2IMG, model=BASE, prompt="", width=64, height=64, steps=1000,
        guidance_scale=3.0, n=8, seed=0, created_at=time.time(),
    )  # fmt: skip
    await gateway.submit(spec)
    worker, killed = "", 0.0
    async with aclosing(gateway.follow(spec.id)) as streamed:
        async for one in streamed:
            if killed and one.event.type == then:
                seconds = time.monotonic() - killed
                break
            if isinstance(one.event, StartedEvent):
                worker = one.event.worker
            elif isinstance(one.event, ProgressEvent) and not killed:
                await asyncio.sleep(moment)
                killed = time.monotonic()
                kill(worker)
        else:
            raise RuntimeError(f"{spec.id} ended before its worker could be killed")
    await gateway.cancel(spec.id)
    await gateway.wait(spec.id, _END_SECONDS)
    return seconds
