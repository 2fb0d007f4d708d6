"""Many workers, cancels and sweeps at once: every job ends exactly once and nothing is left over."""

import asyncio
import random
import threading
from collections.abc import Callable
from importlib.metadata import version

from redis import Redis

from broker import rq_surface
from broker.gateway_side import JobBroker
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys, metrics
from contract.errors import ErrorCode
from contract.events import TERMINAL_TYPES, parse_event
from contract.spec import JobError, JobResult, JobSpec, Priority

JOBS = 150


def work(worker: WorkerBroker, done: threading.Event, seed: int, result_of: Callable[[TakenJob], JobResult]) -> None:
    """Takes a few, then ends them in every possible way; some are kept until the lease is over."""
    chance = random.Random(seed)
    held: list[TakenJob] = []
    while not (done.is_set() and not held):
        held += worker.take(4)
        for job_id, stop in worker.stops(held).items():
            for job in [job for job in held if job.job_id == job_id]:
                worker.end_stopped(job, stop)
                held.remove(job)
        for job in list(held):
            match chance.randrange(6):
                case 0:
                    worker.hand_back(job)
                case 1:
                    worker.fail(job, JobError(code=ErrorCode.INTERNAL, detail="drawn"))
                case 2:
                    continue  # silent, perhaps past its lease
                case _:
                    worker.succeed(job, result_of(job))
            held.remove(job)


async def test_every_job_ends_exactly_once(
    gateway: JobBroker,
    make_worker: Callable[..., WorkerBroker],
    make_spec: Callable[..., JobSpec],
    result_of: Callable[[TakenJob], JobResult],
    redis_client: Redis,
) -> None:
    specs = [make_spec(priority=random.choice(list(Priority))) for _ in range(JOBS)]
    done = threading.Event()
    workers = [make_worker(lease_seconds=0.05) for _ in range(3)]
    threads = [
        threading.Thread(target=work, args=(worker, done, i, result_of), name=f"worker-{i}")
        for i, worker in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for spec in specs:
            await gateway.submit(spec)
            if random.random() < 0.2:
                await gateway.cancel(random.choice(specs).id)
        async with asyncio.timeout(30):
            while redis_client.zcard(keys.ended()) < JOBS:
                await asyncio.to_thread(workers[0].sweep)
                await asyncio.sleep(0.02)
    finally:
        done.set()
        for thread in threads:
            await asyncio.to_thread(thread.join)

    for spec in specs:
        entries = redis_client.xrange(keys.events(spec.id)) or ()
        types = [parse_event(fields[b"event"]).type for _, fields in entries if fields]
        assert [kind in TERMINAL_TYPES for kind in types] == [False] * (len(types) - 1) + [True], types
    counters = await gateway.counters()
    assert sum(n for name, n in counters.items() if name.startswith(metrics.JOBS_ENDED.name)) == JOBS
    for priority in Priority:
        queue = keys.queue_name("tiny", priority)
        for key in (
            rq_surface.queue_key(queue),
            rq_surface.started_key(queue),
            keys.line(queue, None),
            keys.returned(queue),
            keys.suspects(queue),
        ):
            assert not redis_client.exists(key), key
    for key in (keys.leases(), keys.deadlines(), keys.waiting(None, "tiny")):
        assert not redis_client.exists(key), key


def test_the_rq_that_was_read_is_the_rq_that_runs() -> None:
    """`rq_surface` rests on private parts; read them again before the pin moves."""
    assert version("rq").startswith("2.12."), "read broker/rq_surface.py against the new rq, then move this pin"
    assert rq_surface.job_key("x") == "rq:job:x"
    assert rq_surface.queue_key("x") == "rq:queue:x"
    assert rq_surface.started_key("x") == "rq:wip:x"
