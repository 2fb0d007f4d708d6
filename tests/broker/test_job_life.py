"""One job from submit to its end, seen from both sides and by RQ's own tools."""

from collections.abc import Callable
from contextlib import aclosing
from zlib import compress

import pytest
from redis import Redis

from broker.gateway_side import JobBroker
from broker.stops import Stop
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys, metrics
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobError, JobResult, JobSpec, JobStatus, JobWarning, Priority

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]


async def test_a_job_succeeds(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    spec = make_spec(n=2, prompt="größe ☕")
    submitted = await gateway.submit(spec)
    assert submitted.job_id == spec.id
    assert submitted.created
    queued = await gateway.get(spec.id)
    assert queued is not None
    assert queued.status is JobStatus.QUEUED
    assert queued.queue_position == 0
    assert queued.spec == spec

    (job,) = worker.take(8)
    assert job.spec == spec
    worker.warn(job, [JobWarning(code="unknown_words", message="größe")])
    worker.progress(job, 1, 4)
    worker.preview(job, 0, 1, b"jpeg", "image/jpeg")
    running = await gateway.get(spec.id)
    assert running is not None
    assert running.status is JobStatus.RUNNING
    assert (running.step, running.steps) == (1, 4)
    assert [warning.code for warning in running.warnings] == ["unknown_words"]
    assert await gateway.preview(spec.id) == b"jpeg"

    assert worker.succeed(job, result_of(job))
    ended = await gateway.get(spec.id)
    assert ended is not None
    assert ended.status is JobStatus.SUCCEEDED
    assert ended.result == result_of(job)
    assert ended.started_at is not None
    assert ended.finished_at is not None
    assert ended.created_at <= ended.started_at <= ended.finished_at
    assert await gateway.preview(spec.id) is None
    assert await gateway.running() == 0

    async with aclosing(gateway.follow(spec.id)) as events:
        types = [streamed.event.type async for streamed in events]
    assert types == ["queued", "started", "progress", "preview", "succeeded"]
    counters = await gateway.counters()
    assert counters[keys.counter(metrics.PICTURES.name, "tiny", "txt2img")] == 2
    assert counters[keys.counter(metrics.JOBS_ENDED.name, "tiny", "txt2img", "succeeded")] == 1
    assert counters[keys.counter(metrics.JOBS_SUBMITTED.name, "tiny", "txt2img", "interactive")] == 1


async def test_a_job_fails(gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    (job,) = worker.take(1)
    error = JobError(code=ErrorCode.OUT_OF_MEMORY, detail="too big")
    assert worker.fail(job, error)
    record = await gateway.get(spec.id)
    assert record is not None
    assert record.status is JobStatus.FAILED
    assert record.error == error


async def test_take_goes_by_priority_then_age_and_never_beyond_the_slots(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec
) -> None:
    batch = [make_spec(priority="batch") for _ in range(2)]
    interactive = [make_spec() for _ in range(3)]
    for spec in [*batch, *interactive]:
        await gateway.submit(spec)
    record = await gateway.get(batch[1].id)
    assert record is not None
    assert record.queue_position == 4
    assert worker.take(0) == []
    assert [job.job_id for job in worker.take(2)] == [spec.id for spec in interactive[:2]]
    assert [job.job_id for job in worker.take(9)] == [interactive[2].id, *(spec.id for spec in batch)]
    assert worker.take(9) == []


async def test_a_doubled_id_runs_once(
    gateway: JobBroker, make_worker: Callable[[], WorkerBroker], make_spec: MakeSpec, redis_client: Redis
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    queue = f"rq:queue:{keys.queue_name('tiny', Priority.INTERACTIVE)}"
    redis_client.rpush(queue, spec.id, spec.id, "never-submitted")
    taken = [job for _ in range(2) for job in make_worker().take(2)]
    assert [job.job_id for job in taken] == [spec.id]
    assert not redis_client.exists(queue)
    assert redis_client.zcard(keys.leases()) == 1


async def test_cancel_while_queued_running_and_ended(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, settings: Settings
) -> None:
    waiting, running = make_spec(), make_spec()
    await gateway.submit(running)
    await gateway.submit(waiting)
    (job,) = worker.take(1)
    assert await gateway.cancel(waiting.id) is JobStatus.CANCELLED
    assert worker.take(1) == []
    assert await gateway.cancel(running.id) is JobStatus.RUNNING
    assert worker.stops([job]) == {running.id: Stop.CANCELLED}
    assert worker.end_stopped(job, Stop.CANCELLED)
    for spec in (waiting, running):
        record = await gateway.get(spec.id)
        assert record is not None
        assert record.status is JobStatus.CANCELLED
        assert await gateway.cancel(spec.id) is JobStatus.CANCELLED
        async with aclosing(gateway.follow(spec.id)) as events:
            assert [streamed async for streamed in events][-1].event.type == "cancelled"
    assert await gateway.cancel("unknown") is None


async def test_a_second_ending_is_thrown_away(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    (zombie,) = worker.take(1)
    assert worker.hand_back(zombie)
    (job,) = worker.take(1)
    assert job.execution_id != zombie.execution_id
    assert worker.heartbeat([zombie, job]) == {spec.id}
    worker.progress(zombie, 4, 4)
    assert not worker.succeed(zombie, result_of(zombie))
    assert not worker.fail(zombie, JobError(code=ErrorCode.INTERNAL, detail="no"))
    assert worker.succeed(job, result_of(job))
    assert worker.succeed(job, result_of(job))  # its answer may have got lost: done once, and said again
    assert not worker.fail(job, JobError(code=ErrorCode.INTERNAL, detail="no"))
    record = await gateway.get(spec.id)
    assert record is not None
    assert record.result == result_of(job)
    async with aclosing(gateway.follow(spec.id)) as events:
        types = [streamed.event.type async for streamed in events]
    assert types == ["queued", "started", "queued", "started", "succeeded"]
    counters = await gateway.counters()
    assert counters[keys.counter(metrics.RESULTS_FENCED.name, "tiny")] == 3
    assert counters[keys.counter(metrics.JOBS_ENDED.name, "tiny", "txt2img", "succeeded")] == 1
    assert counters[keys.counter(metrics.DENOISING_STEPS.name, "tiny")] == spec.steps


async def test_an_unreadable_job_fails_and_its_neighbours_run(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, redis_client: Redis
) -> None:
    bad, good = make_spec(api_key_id="a"), make_spec()
    await gateway.submit(bad)
    await gateway.submit(good)
    redis_client.hset(f"rq:job:{bad.id}", "data", compress(b'["os.system", null, ["true"], {}]'))
    assert [job.job_id for job in worker.take(8)] == [good.id]
    assert redis_client.hget(f"rq:job:{bad.id}", "status") == b"failed"
    error = JobError.model_validate_json(redis_client.hget(keys.job(bad.id), "error") or b"")
    assert error.code is ErrorCode.SPEC_UNSUPPORTED
    counters = await gateway.counters()
    assert counters[keys.counter(metrics.STEPS_ENDED.name, "tiny")] == bad.n * bad.steps
    assert counters[keys.counter(metrics.JOBS_FAILED.name, "tiny", "spec_unsupported")] == 1
    assert redis_client.smembers(keys.waiting("a", "tiny")) == set()
    assert await gateway.delete(bad.id) is JobStatus.FAILED
    assert list(redis_client.scan_iter(f"*{bad.id}*")) == []
    assert redis_client.zrange(keys.jobs_of("a"), 0, -1) == []


@pytest.mark.parametrize("status", ["queued", "running"])
async def test_deadlines(
    gateway: JobBroker,
    make_worker: Callable[..., WorkerBroker],
    make_spec: MakeSpec,
    status: str,
    redis_client: Redis,
) -> None:
    spec = make_spec(deadline_seconds=0.05)
    await gateway.submit(spec)
    worker = make_worker()
    taken = worker.take(1) if status == "running" else []
    while redis_client.zcard(keys.deadlines()):
        await gateway.sweep()
    for job in taken:
        assert worker.stops([job]) == {job.job_id: Stop.DEADLINE}
        assert worker.end_stopped(job, Stop.DEADLINE)
    record = await gateway.get(spec.id)
    assert record is not None
    assert record.error is not None
    assert record.error.code is (ErrorCode.DEADLINE_EXCEEDED if taken else ErrorCode.EXPIRED)
