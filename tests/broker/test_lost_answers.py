"""A request goes through and its answer gets lost: what was done is done once, and known to have been done."""

from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest
from redis import Redis

from broker.connection import REDIS_UNAVAILABLE
from broker.fence import _RUN
from broker.gateway_side import JobBroker
from broker.stops import Stop
from broker.take import _TAKE, TakenJob
from broker.worker_side import WorkerBroker
from contract import keys, metrics
from contract.card import ModelCard
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobError, JobResult, JobSpec, JobStatus
from tests.broker.lossy import LossyProxy

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]
SCRIPT = b"EVALSHA"
TRIES = 5  # of redis-py, as `broker.connection` asks for


@pytest.fixture
def proxy(settings: Settings) -> Iterator[LossyProxy]:
    with LossyProxy(settings.redis_url) as proxy:
        yield proxy


@pytest.fixture
def worker(settings: Settings, card: ModelCard, proxy: LossyProxy) -> Iterator[WorkerBroker]:
    """Its only way to the server is through the proxy. The server knows the scripts: their answers get lost."""
    worker = WorkerBroker(settings.model_copy(update={"redis_url": proxy.url}), [card], slots=8)
    worker.register()
    for script in (_RUN, _TAKE):
        worker._redis.script_load(script)
    yield worker
    worker.close()


async def types_of(gateway: JobBroker, job_id: str) -> list[str]:
    async with aclosing(gateway.follow(job_id)) as events:
        return [streamed.event.type async for streamed in events]


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
async def test_an_end_is_written_once_and_known(
    gateway: JobBroker, worker: WorkerBroker, proxy: LossyProxy, make_spec: MakeSpec, result_of: ResultOf, end: str
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    (job,) = worker.take(1)
    proxy.lose_answers(SCRIPT)
    match end:
        case "succeeded":
            assert worker.succeed(job, result_of(job))
        case "failed":
            assert worker.fail(job, JobError(code=ErrorCode.INTERNAL, detail="no"))
        case _:
            assert worker.end_stopped(job, Stop.CANCELLED)
    assert proxy.lost == 1
    assert await types_of(gateway, spec.id) == ["queued", "started", end]
    counters = await gateway.counters()
    assert counters[keys.counter(metrics.JOBS_ENDED.name, "tiny", "txt2img", end)] == 1
    assert keys.counter(metrics.RESULTS_FENCED.name, "tiny") not in counters


async def test_an_end_is_known_even_when_every_try_lost_its_answer(
    gateway: JobBroker, worker: WorkerBroker, proxy: LossyProxy, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    await gateway.submit(make_spec())
    (job,) = worker.take(1)
    proxy.lose_answers(SCRIPT, TRIES)
    with pytest.raises(REDIS_UNAVAILABLE):
        worker.succeed(job, result_of(job))
    assert proxy.lost == TRIES
    record = await gateway.get(job.job_id)
    assert record is not None
    assert record.status is JobStatus.SUCCEEDED
    assert worker.succeed(job, result_of(job))


async def test_a_job_is_handed_back_once(
    gateway: JobBroker, worker: WorkerBroker, proxy: LossyProxy, make_spec: MakeSpec, redis_client: Redis
) -> None:
    spec = make_spec()
    await gateway.submit(spec)
    (job,) = worker.take(1)
    proxy.lose_answers(SCRIPT)
    assert worker.hand_back(job, {0: b"state"}, 1)
    (again,) = worker.take(8)
    assert again.resume == {0: b"state"}
    assert redis_client.xlen(keys.events(spec.id)) == 4


@pytest.mark.parametrize("lost", [1, TRIES])
async def test_taken_jobs_come_with_the_next_answer(
    gateway: JobBroker, worker: WorkerBroker, proxy: LossyProxy, make_spec: MakeSpec, result_of: ResultOf, lost: int
) -> None:
    specs = [make_spec() for _ in range(4)]
    for spec in specs:
        await gateway.submit(spec)
    (first,) = worker.take(1)
    proxy.lose_answers(SCRIPT, lost)
    if lost == TRIES:
        with pytest.raises(REDIS_UNAVAILABLE):
            worker.take(2)
    jobs = worker.take(2)
    assert [job.job_id for job in jobs] == [specs[1].id, specs[2].id]
    assert [job.job_id for job in worker.take(8)] == [specs[3].id]
    assert all(worker.succeed(job, result_of(job)) for job in (first, *jobs))
    assert await types_of(gateway, specs[1].id) == ["queued", "started", "succeeded"]


async def test_taken_jobs_that_went_elsewhere_do_not_come_again(
    gateway: JobBroker,
    worker: WorkerBroker,
    proxy: LossyProxy,
    make_spec: MakeSpec,
    make_worker: Callable[..., WorkerBroker],
) -> None:
    specs = [make_spec(), make_spec()]
    await gateway.submit(specs[0])
    proxy.lose_answers(SCRIPT, TRIES)
    with pytest.raises(REDIS_UNAVAILABLE):
        worker.take(1)
    other = make_worker()
    other._sweeper.reap_worker(worker.name)
    assert [job.job_id for job in other.take(1)] == [specs[0].id]
    await gateway.submit(specs[1])
    assert [job.job_id for job in worker.take(8)] == [specs[1].id]
