"""Ten times what the service can do, for two minutes: `make bench-overload`.

The whole service with tiny models: gateway, worker and Valkey as processes of their own. Its capacity is measured
first, with a full queue; then requests come at a fixed rate, whether or not the ones before have been answered. Every
request must be accepted, and its job then end, or be refused with 429 and Retry-After. Latencies run from when a
request was due, so that a service that keeps its clients waiting cannot hide it.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import uvloop
from redis import Redis

from benchmarks.http_load import Answer, Connection, post_bytes
from benchmarks.processes import resident_bytes
from benchmarks.report import FOLDER, conditions, publish, table
from broker.connection import connect
from cli.stack import Stack, StackConfig
from contract.spec import JobStatus
from tests.tiny_models import BASE, save_tiny_models

NAME: Final = "bench-overload"
QUEUE_DEPTH: Final = 100
_MIB: Final = 2**20
_SAMPLE_SECONDS: Final = 0.5
_IDLE_SECONDS: Final = 3.0
_DRAIN_SECONDS: Final = 120.0
_PARTS: Final = ("gateway", "valkey")


@dataclass
class Answers:
    """Seconds by outcome; the accepted jobs; what should not have come, in words."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)

    def add(self, answer: Answer, seconds: float) -> None:
        if answer.status == 202:
            self.accepted.append(seconds)
            self.jobs.append(json.loads(answer.body)["id"])
        elif answer.status == 429 and b"\r\nretry-after: " in answer.head:
            self.refused.append(seconds)
            self.codes[json.loads(answer.body)["code"]] += 1
        else:
            self.wrong[f"{answer.status} {answer.body[:200]!r}"] += 1


class Load:
    """Requests at a fixed rate over as many connections as it takes."""

    def __init__(self, url: str, request: bytes) -> None:
        self._url = url
        self._request = request
        self._free: list[tuple[Connection, float]] = []  # and since when
        self.connections = 0

    async def send(self, answers: Answers, due: float) -> None:
        begun = min(due, time.perf_counter())  # timers may be a little early
        try:
            connection = await self._connection()
            answer = await connection.send(self._request)
        except (OSError, TimeoutError) as error:
            answers.wrong[repr(error)] += 1
            return
        answers.add(answer, time.perf_counter() - begun)
        self._free.append((connection, time.perf_counter()))

    async def at_rate(self, per_second: float, seconds: float) -> Answers:
        answers, begun = Answers(), time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(round(per_second * seconds)):
                due = begun + number / per_second
                if (pause := due - time.perf_counter()) > 0:
                    await asyncio.sleep(pause)
                tasks.create_task(self.send(answers, due))
        return answers

    def close(self) -> None:
        for connection, _ in self._free:
            connection.close()

    async def _connection(self) -> Connection:
        """The one that was used last, if the server keeps it open for sure: it closes those that idle for 5 s."""
        if self._free:
            connection, since = self._free.pop()
            if time.perf_counter() - since < _IDLE_SECONDS:
                return connection
            for idle, _ in (*self._free, (connection, since)):  # these have been idle for even longer
                idle.close()
            self._free.clear()
        self.connections += 1
        return await Connection.open(self._url)


class Memory:
    """Resident bytes of the service's processes over time; of Valkey also what its data take."""

    def __init__(self, stack: Stack, redis: Redis) -> None:
        self._pids = {part: stack.pids[part] for part in _PARTS}
        self._redis = redis
        self.samples: dict[str, list[int]] = {part: [] for part in (*_PARTS, "valkey, its data")}

    def sample(self) -> None:
        for part, pid in self._pids.items():
            self.samples[part].append(resident_bytes(pid))
        info: Any = self._redis.info("memory")
        self.samples["valkey, its data"].append(info["used_memory"])

    async def watch(self) -> None:
        while True:
            self.sample()
            await asyncio.sleep(_SAMPLE_SECONDS)


async def capacity(url: str, request: bytes, seconds: float) -> float:
    """Jobs that end per second while the queue never runs empty."""
    load = Load(url, request)
    async with httpx.AsyncClient(base_url=url) as http:
        await load.at_rate(2 * QUEUE_DEPTH / seconds, seconds / 4)  # fills the queue, and warms everything up
        filling = asyncio.create_task(load.at_rate(4 * QUEUE_DEPTH / seconds, seconds))
        before, begun = await _ended(http), time.perf_counter()
        await filling
        ended, taken = await _ended(http) - before, time.perf_counter() - begun
    load.close()
    return ended / taken


async def _ended(http: httpx.AsyncClient) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("darkroom_jobs_ended_total{"))


async def ends(url: str, jobs: Sequence[str]) -> Counter[str]:
    """How the jobs ended; those that have not within two minutes count by their status."""
    deadline, states, left = time.monotonic() + _DRAIN_SECONDS, dict.fromkeys(jobs, "queued"), list(jobs)
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        while left and time.monotonic() < deadline:
            for job in left:
                answer = await http.get(f"/v1/jobs/{job}")
                states[job] = answer.json()["status"] if answer.status_code == 200 else f"lost ({answer.status_code})"
            left = [job for job in left if states[job] in (JobStatus.QUEUED, JobStatus.RUNNING)]
            await asyncio.sleep(0.5)
    return Counter(states.values())


async def _run(stack: Stack, memory: Memory, times: float, seconds: float, steps: int) -> dict[str, Any]:
    fields = {"model": BASE, "prompt": "a pizza", "steps": steps, "seed": 1}
    request = post_bytes(stack.url, "/v1/txt2img", fields)
    able = await capacity(stack.url, request, min(seconds, 10.0))
    load, watching = Load(stack.url, request), asyncio.create_task(memory.watch())
    answers = await load.at_rate(times * able, seconds)
    outcome = await ends(stack.url, answers.jobs)
    watching.cancel()
    memory.sample()
    load.close()
    return {
        "capacity": able,
        "offered per second": times * able,
        "accepted": answers.accepted,
        "refused": answers.refused,
        "refusals": dict(answers.codes),
        "wrong": dict(answers.wrong),
        "ends": dict(outcome),
        "connections": load.connections,
        "memory": memory.samples,
    }


def measure(times: float, seconds: float, steps: int) -> dict[str, Any]:
    settings = {
        "DARKROOM_MAX_QUEUE_DEPTH": str(QUEUE_DEPTH),
        "DARKROOM_MAX_WAITING_PER_KEY": "1000000",
        "DARKROOM_RATE_PER_SECOND": "1e6",
        "DARKROOM_RATE_BURST": "1000000",
        "DARKROOM_WORKER_THREADS": "1",
    }
    with tempfile.TemporaryDirectory(prefix="darkroom-") as data:
        models = Path(data) / "models"
        models.mkdir()
        save_tiny_models(models)
        with Stack(StackConfig(Path(data) / "stack", models, (BASE,), settings=settings)) as stack:
            with connect(stack.redis_url) as redis:
                figures = uvloop.run(_run(stack, Memory(stack, redis), times, seconds, steps))
            stack.check()
    held = conditions(times=times, seconds=seconds, steps=steps, queue=QUEUE_DEPTH, cores=os.cpu_count())
    return {"conditions": held, **figures}


def as_table(figures: dict[str, Any]) -> str:
    accepted, refused = figures["accepted"], figures["refused"]
    sent = len(accepted) + len(refused) + sum(figures["wrong"].values())
    rows = [
        ("jobs per second that the service can do", f"{figures['capacity']:.1f}"),
        ("requests per second that came", f"{figures['offered per second']:.0f}"),
        ("requests", sent),
        ("accepted", len(accepted)),
        ("of these ended as", ", ".join(f"{count} {end}" for end, count in figures["ends"].items()) or "none"),
        ("429 with Retry-After", len(refused)),
        ("anything else", sum(figures["wrong"].values())),
        ("accepted within, ms: p50 / p99", _latencies(accepted)),
        ("refused within, ms: p50 / p99", _latencies(refused)),
        ("connections", figures["connections"]),
    ]
    memory = [
        (part, *(f"{value / _MIB:.1f}" for value in (samples[0], max(samples), samples[-1])))
        for part, samples in figures["memory"].items()
    ]
    data = figures["memory"]["valkey, its data"]
    kept = (data[-1] - data[0]) / 1024 / max(1, len(accepted))
    return "\n\n".join(
        (
            table(("overload", ""), rows),
            table(("MiB of memory", "start", "peak", "end"), memory),
            f"An ended job and its events are kept for a while, so Valkey's data grow with what is accepted: by "
            f"{kept:.1f} KiB per job here. What is refused leaves nothing.",
        )
    )


def _latencies(seconds: Sequence[float]) -> str:
    if len(seconds) < 2:
        return "too few"
    points = statistics.quantiles(seconds, n=100)
    return f"{1000 * points[49]:.1f} / {1000 * points[98]:.1f}"


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """What is kept of tens of thousands of latencies."""
    if len(seconds) < 2:
        return {"count": len(seconds)}
    points = statistics.quantiles(seconds, n=100)
    kept = {f"p{share}": points[share - 1] for share in (1, 10, 25, 50, 75, 90, 95, 99)}
    return {"count": len(seconds), **kept, "longest": max(seconds)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=float, default=10.0, help="the capacity")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--steps", type=int, default=20, help="of a job: how much work it is")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    figures = measure(options.times, options.seconds, options.steps)
    shares = {name: _percentiles(figures[name]) for name in ("accepted", "refused")}
    publish(NAME, figures | shares, as_table(figures), options.out)
    unfinished = set(figures["ends"]) - {status.value for status in JobStatus if status.ended}
    if figures["wrong"] or unfinished:
        raise SystemExit(f"promises were broken: {figures['wrong']} {sorted(unfinished)}")


if __name__ == "__main__":
    main()
