"""The atomic submit under concurrency: limits hold exactly, a key makes one job."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from redis import Redis

from broker.gateway_side import JobBroker
from broker.limits import SubmitRefusedError
from broker.submit import Submitted
from contract import keys
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobSpec, Priority

MakeSpec = Callable[..., JobSpec]
MakeGateway = Callable[..., JobBroker]
QUEUE = f"rq:queue:{keys.queue_name('tiny', Priority.INTERACTIVE)}"


@pytest.fixture
async def make_gateway(settings: Settings) -> AsyncIterator[MakeGateway]:
    brokers: list[JobBroker] = []

    def make(**changes: float) -> JobBroker:
        brokers.append(JobBroker(settings.model_copy(update=changes)))
        return brokers[-1]

    yield make
    for broker in brokers:
        await broker.close()


async def outcomes(broker: JobBroker, specs: list[JobSpec]) -> list[Submitted | SubmitRefusedError]:
    answers = await asyncio.gather(*(broker.submit(spec) for spec in specs), return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, Submitted | SubmitRefusedError), answer
    return answers  # type: ignore[return-value]


async def test_the_queue_limit_is_exact_under_200_concurrent_tries(
    make_gateway: MakeGateway, make_spec: MakeSpec, redis_client: Redis
) -> None:
    broker = make_gateway(max_queue_depth=50, rate_burst=1000)
    answers = await outcomes(broker, [make_spec() for _ in range(200)])
    refused = [answer for answer in answers if isinstance(answer, SubmitRefusedError)]
    assert len(answers) - len(refused) == 50
    assert {answer.code for answer in refused} == {ErrorCode.QUEUE_FULL}
    assert all(answer.retry_after for answer in refused)
    assert redis_client.llen(QUEUE) == 50
    assert len(list(redis_client.scan_iter("rq:job:*"))) == 50  # a refused job leaves nothing behind
    assert len(list(redis_client.scan_iter("darkroom:job:*"))) == 50


async def test_one_key_may_not_fill_the_queue(make_gateway: MakeGateway, make_spec: MakeSpec) -> None:
    broker = make_gateway(max_waiting_per_key=3)
    answers = await outcomes(broker, [make_spec(api_key_id="a") for _ in range(5)])
    assert sum(isinstance(answer, Submitted) for answer in answers) == 3
    await broker.submit(make_spec(api_key_id="b"))
    accepted = next(answer for answer in answers if isinstance(answer, Submitted))
    await broker.cancel(accepted.job_id)
    await broker.submit(make_spec(api_key_id="a"))


async def test_the_rate_limit_names_the_wait(make_gateway: MakeGateway, make_spec: MakeSpec) -> None:
    broker = make_gateway(rate_burst=2, rate_per_second=4.0)
    answers = await outcomes(broker, [make_spec() for _ in range(3)])
    (refused,) = [answer for answer in answers if isinstance(answer, SubmitRefusedError)]
    assert refused.code is ErrorCode.RATE_LIMITED
    assert refused.retry_after is not None
    assert 0 < refused.retry_after <= 0.25
    await asyncio.sleep(refused.retry_after + 0.01)
    await broker.submit(make_spec())


async def test_one_idempotency_key_makes_one_job(
    make_gateway: MakeGateway, make_spec: MakeSpec, redis_client: Redis
) -> None:
    broker = make_gateway()
    tries = await asyncio.gather(*(broker.submit(make_spec(), "key", "body") for _ in range(20)))
    assert len({answer.job_id for answer in tries}) == 1
    assert sum(answer.created for answer in tries) == 1
    assert redis_client.llen(QUEUE) == 1
    with pytest.raises(SubmitRefusedError) as refused:
        await broker.submit(make_spec(), "key", "another body")
    assert refused.value.code is ErrorCode.IDEMPOTENCY_MISMATCH
    other = await broker.submit(make_spec(api_key_id="b"), "key", "another body")
    assert other.created  # keys are scoped to the caller
    with pytest.raises(ValueError, match="go together"):
        await broker.submit(make_spec(), "key")


async def test_the_same_submit_sent_twice_queues_once(
    make_gateway: MakeGateway, make_spec: MakeSpec, redis_client: Redis
) -> None:
    """What redis-py does when the connection breaks before the answer."""
    broker, spec = make_gateway(), make_spec()
    assert await broker.submit(spec) == await broker.submit(spec)
    assert redis_client.llen(QUEUE) == 1
