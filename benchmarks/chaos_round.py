"""One run of many jobs on two supervised workers, with whatever is to go wrong on the way."""

import asyncio
import os
import random
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import chaos_worker
from benchmarks.chaos_jobs import store_inputs
from benchmarks.crew import Crew, CrewMember
from broker.connection import REDIS_UNAVAILABLE
from broker.gateway_side import JobBroker
from contract import metrics
from contract.spec import JobSpec, JobStatus
from tests.tiny_models import BASE, UPSCALER

WORKERS: Final = 2
_SETTINGS: Final = {
    "lease_seconds": 3.0, "heartbeat_seconds": 0.5, "reap_seconds": 0.25, "resume_seconds": 0.25,
    "worker_slots": 2,  # so few that jobs still wait when the last fault comes: some strike where a job is taken
    "rate_burst": 10**6, "rate_per_second": 1e6, "max_queue_depth": 10**6, "max_waiting_per_key": 10**6,
}  # fmt: skip
_START_SECONDS: Final = 60.0
_ENDS: Final = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs, by id: `ends` counts terminal events, `files` are the bytes of the pictures. `steps` of
    denoising were done in all; of the points at which a worker should die, none came by those in `left`."""

    seconds: float
    steps: int
    status: Mapping[str, JobStatus]
    ends: Mapping[str, int]
    files: Mapping[str, list[bytes]]
    counters: Mapping[str, int]
    left: Sequence[str]

    @property
    def lost(self) -> int:
        return sum(not status.ended for status in self.status.values())

    @property
    def doubled(self) -> int:
        """Jobs that ended more than once, by their events or by the counters of the finishing script."""
        return max(sum(ends > 1 for ends in self.ends.values()), self.count(metrics.JOBS_ENDED) - len(self.status))

    @property
    def failed(self) -> int:
        return sum(status in (JobStatus.FAILED, JobStatus.CANCELLED) for status in self.status.values())

    def count(self, metric: metrics.Metric) -> int:
        return _count(self.counters, metric)


class Round:
    """The jobs, once, on a crew of its own in `folder`. A job that has not ended after `patience` seconds is lost."""

    def __init__(self, folder: Path, model_dir: Path, specs: Sequence[JobSpec], patience: float) -> None:
        self._specs = specs
        self._patience = patience
        self._points = folder / "points"
        self._points.mkdir(parents=True)
        models = ",".join((BASE, UPSCALER))
        command = [sys.executable, "-m", "benchmarks.chaos_worker", "--models", models, "--model-dir", str(model_dir)]
        self._crew = Crew(folder, command, {"CHAOS_DIR": str(self._points)}, **_SETTINGS)
        self._thaws: list[asyncio.Task[None]] = []

    async def run(self, faults: Sequence[str], chance: random.Random) -> Outcome:
        """One fault after the other, spread evenly over the ends of the first three quarters of the jobs."""
        with self._crew:
            gateway = JobBroker(self._crew.settings)
            store_inputs(gateway.store)
            supervisor = self._crew.supervise(WORKERS, healthy_seconds=1.0)
            await asyncio.to_thread(supervisor.wait_for, "worker ready", WORKERS)
            begun = time.monotonic()
            for spec in self._specs:
                await gateway.submit(spec)
            for number, fault in enumerate(faults, 1):
                share = 0.75 * number / (len(faults) + 1)
                await self._until_ended(gateway, int(share * len(self._specs)), begun)
                await self._harm(fault, supervisor, chance)
            await self._until_ended(gateway, len(self._specs), begun)
            seconds = time.monotonic() - begun
            await asyncio.gather(*self._thaws)
            await asyncio.sleep(self._crew.settings.lease_seconds)  # for results that come too late
            outcome = await self._outcome(gateway, seconds)
            await gateway.close()
        return outcome

    async def _until_ended(self, gateway: JobBroker, count: int, begun: float) -> None:
        while time.monotonic() < begun + self._patience:
            with suppress(*REDIS_UNAVAILABLE):
                if _count(await gateway.counters(), metrics.JOBS_ENDED) >= count:
                    return
            await asyncio.sleep(0.02)

    async def _harm(self, fault: str, supervisor: CrewMember, chance: random.Random) -> None:
        if fault == "restart":
            await asyncio.to_thread(self._crew.valkey.stop)
            await asyncio.to_thread(self._crew.valkey.start)
        elif fault.startswith("kill "):
            (self._points / fault.removeprefix("kill ")).touch()
        else:
            pid = chance.choice(await asyncio.to_thread(working, supervisor))
            os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            if fault == "freeze":
                self._thaws.append(asyncio.create_task(self._thaw(pid)))

    async def _thaw(self, pid: int) -> None:
        await asyncio.sleep(1.5 * self._crew.settings.lease_seconds)
        with suppress(ProcessLookupError):  # killed meanwhile
            os.kill(pid, signal.SIGCONT)

    async def _outcome(self, gateway: JobBroker, seconds: float) -> Outcome:
        status: dict[str, JobStatus] = {}
        ends: dict[str, int] = {}
        files: dict[str, list[bytes]] = {}
        for spec in self._specs:
            record = await gateway.get(spec.id)
            assert record is not None
            status[spec.id] = record.status
            pictures = record.result.pictures if record.result else ()
            files[spec.id] = [gateway.store.get(picture.key) for picture in pictures]
            if record.status.ended:
                async with aclosing(gateway.follow(spec.id)) as events:
                    ends[spec.id] = sum([one.event.type in _ENDS async for one in events])
        steps = sum(path.stat().st_size for path in self._points.glob("steps-*"))
        left = [point for point in chaos_worker.POINTS if (self._points / point).exists()]
        return Outcome(seconds, steps, status, ends, files, await gateway.counters(), left)


def working(supervisor: CrewMember) -> list[int]:
    """The processes that have loaded their models and still live; waits until there is one.

    Raises `TimeoutError` where none comes.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        log = supervisor.log.read_text(errors="replace")
        ready = set(re.findall(r"worker ready .*worker=(\S+)", log))
        started = re.findall(r"worker started .*pid=(\d+) worker=(\S+)", log)
        if alive := [int(pid) for pid, name in started if name in ready and Path(f"/proc/{pid}").exists()]:
            return alive
        time.sleep(0.05)
    raise TimeoutError(f"no worker was ready within {_START_SECONDS:g} s:\n{log[-2000:]}")


def _count(counters: Mapping[str, int], metric: metrics.Metric) -> int:
    """Over all labels."""
    return sum(count for name, count in counters.items() if name.startswith(metric.name + "|"))
