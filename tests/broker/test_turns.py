"""Who is served next: API keys in turn, first come first served within one, what came back before what is new."""

from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
from redis import Redis

from broker.gateway_side import JobBroker
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import JobResult, JobSpec, JobStatus, Priority

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]
QUEUE = keys.queue_name("tiny", Priority.INTERACTIVE)


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[JobBroker]:
    broker = JobBroker(settings.model_copy(update={"rate_burst": 1000}))
    yield broker
    await broker.close()


async def submit(gateway: JobBroker, make_spec: MakeSpec, keys_in_order: str, **changes: object) -> list[str]:
    specs = [make_spec(api_key_id=key, **changes) for key in keys_in_order]
    for spec in specs:
        await gateway.submit(spec)
    return [spec.id for spec in specs]


async def test_500_jobs_of_one_key_delay_another_key_by_one_turn(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec
) -> None:
    many = await submit(gateway, make_spec, "a" * 500)
    assert [job.job_id for job in worker.take(3)] == many[:3]
    one, two = await submit(gateway, make_spec, "bb")
    served = [worker.take(1)[0].job_id for _ in range(5)]
    assert one in served[:2]
    assert two in served[:4]
    assert [job for job in served if job in many] == many[3:6]


async def test_keys_take_turns_and_none_starves(gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec) -> None:
    """However often the others come back for more."""
    await submit(gateway, make_spec, "a" * 20 + "bcd" * 2)
    served: Counter[str | None] = Counter()
    for _ in range(40):
        (job,) = worker.take(1)
        served[job.spec.api_key_id] += 1
        if job.spec.api_key_id != "a":
            await submit(gateway, make_spec, job.spec.api_key_id or "")
    assert served == {"a": 10, "b": 10, "c": 10, "d": 10}


async def test_what_came_back_goes_first_and_priority_before_all(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec
) -> None:
    await submit(gateway, make_spec, "aaa")
    (begun,) = worker.take(1)
    await submit(gateway, make_spec, "bbb")
    assert worker.hand_back(begun)
    (batch,) = await submit(gateway, make_spec, "c", priority="batch")
    assert worker.take(1)[0].job_id == begun.job_id
    assert [job.job_id for job in worker.take(9)][-1] == batch


async def test_a_cancelled_job_leaves_its_line(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, redis_client: Redis
) -> None:
    first, second, third = await submit(gateway, make_spec, "aab")
    await gateway.cancel(first)
    assert redis_client.llen(keys.line(QUEUE, "a")) == 1
    (job,) = worker.take(1)
    worker.hand_back(job)
    assert await gateway.cancel(job.job_id) is JobStatus.CANCELLED
    assert not redis_client.exists(keys.returned(QUEUE))
    assert {job.job_id for job in worker.take(9)} == {second, third} - {job.job_id}


async def test_what_stands_in_rqs_list_alone_is_taken_too(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, redis_client: Redis
) -> None:
    """As RQ's own tools put it there."""
    ids = await submit(gateway, make_spec, "ab")
    redis_client.delete(keys.line(QUEUE, "a"), keys.turns(QUEUE))
    assert {job.job_id for job in worker.take(9)} == set(ids)


async def test_models_take_turns_within_a_priority(
    gateway: JobBroker, settings: Settings, card: ModelCard, make_spec: MakeSpec
) -> None:
    cards = [card, card.model_copy(update={"name": "other"})]
    worker = WorkerBroker(settings, cards, slots=8)
    for name in ("tiny", "other"):
        for _ in range(3):
            await gateway.submit(make_spec(model=name))
    assert [worker.take(1)[0].spec.model for _ in range(6)] == ["tiny", "other"] * 3
    worker.close()
