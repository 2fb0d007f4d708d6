"""What the broker costs per job, without any model: `python -m benchmarks.broker` (`make bench-broker`).

One worker against an embedded Valkey without persistence: it takes several jobs at once and ends each as succeeded.
The gateway's part, the submit, is measured apart.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.report import FOLDER, conditions, publish, table
from broker.embedded import EmbeddedValkey
from broker.gateway_side import JobBroker
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import JobResult, JobSpec, PictureResult, Task

_CARD: Final = ModelCard(
    name="none", tasks=(Task.TXT2IMG,), default_width=64, default_height=64, max_width=64, max_height=64,
    size_multiple=8, latent_downsample=8, default_steps={Task.TXT2IMG: 20}, default_guidance={Task.TXT2IMG: 3.0},
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=400, help="jobs per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="jobs taken at once")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    arguments = parser.parse_args()
    figures = measure(arguments.jobs, arguments.rounds, arguments.at_once)
    held = conditions(jobs=arguments.jobs, rounds=arguments.rounds)
    text = table(["the broker alone", "milliseconds (median)"], list(figures.items()))
    publish("bench-broker", {"conditions": held, "milliseconds": figures}, text, arguments.out)


def measure(jobs: int, rounds: int, at_once: list[int]) -> dict[str, float]:
    """Milliseconds by what they were spent on; medians over the rounds."""
    times: dict[str, list[float]] = {}
    with EmbeddedValkey() as server, tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            redis_url=server.url, store_url=f"file:{folder}", rate_per_second=1e9, rate_burst=10**6,
            max_queue_depth=10**6, max_waiting_per_key=10**6,
        )  # fmt: skip
        worker = WorkerBroker(settings, [_CARD], slots=8)
        worker.register()
        for _ in range(rounds):
            for size in at_once:
                submit, run, latency = _round(settings, worker, jobs, size)
                times.setdefault("submit, per job, 8 callers", []).append(submit)
                times.setdefault(f"take and finish, per job, {size} at once", []).append(run)
                times.setdefault("from submit to started, idle worker", []).append(latency)
        worker.close()
    return {name: median(values) for name, values in times.items()}


def _round(settings: Settings, worker: WorkerBroker, jobs: int, size: int) -> tuple[float, float, float]:
    submit = asyncio.run(_submit(settings, jobs))
    begin = time.perf_counter()
    done = 0
    while done < jobs:
        for job in worker.take(size):
            if not worker.succeed(job, _result(job)):
                raise RuntimeError(f"{job.job_id} was fenced off, with one worker alone")
            done += 1
    run = (time.perf_counter() - begin) * 1000 / jobs
    return submit, run, asyncio.run(_latency(settings, worker))


async def _submit(settings: Settings, jobs: int) -> float:
    gateway = JobBroker(settings)
    specs = [_spec() for _ in range(jobs)]
    begin = time.perf_counter()

    async def caller(own: list[JobSpec]) -> None:
        for spec in own:
            await gateway.submit(spec)

    await asyncio.gather(*(caller(specs[i::8]) for i in range(8)))
    taken = (time.perf_counter() - begin) * 1000 / jobs
    await gateway.close()
    return taken


async def _latency(settings: Settings, worker: WorkerBroker) -> float:
    """A worker that looks without a pause, so the broker's own part."""
    gateway = JobBroker(settings)
    await gateway.ping()
    begin = time.perf_counter()
    await gateway.submit(_spec())
    (job,) = worker.take(1)
    taken = (time.perf_counter() - begin) * 1000
    worker.succeed(job, _result(job))
    await gateway.close()
    return taken


_made = 0


def _spec() -> JobSpec:
    global _made  # noqa: PLW0603
    _made += 1
    return JobSpec(
        id=f"bench-{_made}", task=Task.TXT2IMG, model=_CARD.name, prompt="a red circle on a blue ground", width=64,
        height=64, steps=20, guidance_scale=3.0, seed=_made, created_at=time.time(),
    )  # fmt: skip


def _result(job: TakenJob) -> JobResult:
    picture = PictureResult(
        index=0, seed=job.spec.seed, key=keys.output_object(job.job_id, job.execution_id, 0, "png"), width=64,
        height=64, content_type="image/png", bytes=10_000, sha256="0" * 64,
    )  # fmt: skip
    return JobResult(pictures=(picture,))


if __name__ == "__main__":
    main()
