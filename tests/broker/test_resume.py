"""Resume states: written by who holds the job, read by who takes it next, gone with its end."""

from collections.abc import Callable

import pytest
from redis import Redis

from broker.gateway_side import JobBroker
from broker.stops import Stop
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.errors import ErrorCode
from contract.spec import JobError, JobResult, JobSpec

MakeSpec = Callable[..., JobSpec]
MakeWorker = Callable[..., WorkerBroker]
ResultOf = Callable[[TakenJob], JobResult]
STATES = {0: b"\x00state\xff", 2: b""}


async def take_one(gateway: JobBroker, worker: WorkerBroker, spec: JobSpec) -> TakenJob:
    await gateway.submit(spec)
    (job,) = worker.take(1)
    return job


async def test_states_reach_the_next_execution(gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec) -> None:
    job = await take_one(gateway, worker, make_spec(n=3))
    assert job.resume == {}
    assert worker.save_resume(job, STATES, steps=5)
    assert worker.hand_back(job)
    (second,) = worker.take(1)
    assert second.resume == STATES
    assert worker.hand_back(second, {1: b"one", 2: b"two"}, steps=9)
    (third,) = worker.take(1)
    assert third.resume == STATES | {1: b"one", 2: b"two"}


async def test_a_lost_execution_saves_nothing(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, redis_client: Redis, result_of: ResultOf
) -> None:
    zombie = await take_one(gateway, worker, make_spec(n=3))
    assert worker.hand_back(zombie)
    assert not worker.save_resume(zombie, STATES, 1)
    (job,) = worker.take(1)
    assert not worker.save_resume(zombie, STATES, 1)
    worker.hand_back(zombie, STATES, 1)  # the second time, and so without effect
    assert not redis_client.exists(keys.resume(job.job_id))
    assert worker.succeed(job, result_of(job))
    assert not worker.save_resume(job, STATES, 1)
    assert not redis_client.exists(keys.resume(job.job_id))


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel running", "cancel waiting"])
async def test_states_end_with_the_job(
    gateway: JobBroker,
    worker: WorkerBroker,
    make_spec: MakeSpec,
    result_of: ResultOf,
    redis_client: Redis,
    end: str,
) -> None:
    job = await take_one(gateway, worker, make_spec(n=3))
    assert worker.save_resume(job, STATES, 1)
    assert redis_client.ttl(keys.resume(job.job_id)) > 86400  # outlives the longest wait in a queue
    match end:
        case "succeed":
            assert worker.succeed(job, result_of(job))
        case "fail":
            assert worker.fail(job, JobError(code=ErrorCode.INTERNAL, detail="no"))
        case "cancel running":
            assert worker.end_stopped(job, Stop.CANCELLED)
        case _:
            assert worker.hand_back(job)
            await gateway.cancel(job.job_id)
    assert not redis_client.exists(keys.resume(job.job_id))


async def test_too_large_states_are_not_kept(
    gateway: JobBroker, make_worker: MakeWorker, make_spec: MakeSpec, redis_client: Redis
) -> None:
    worker = make_worker(max_resume_bytes=20)
    job = await take_one(gateway, worker, make_spec(n=2))
    assert worker.save_resume(job, {0: b"x" * 11}, 1)
    assert not redis_client.exists(keys.resume(job.job_id))
    assert worker.save_resume(job, {0: b"x" * 10, 1: b"y" * 10}, 2)
    assert redis_client.hlen(keys.resume(job.job_id)) == 3
