"""Steps submitted less steps ended is the work that is queued or running: what workers are scaled by."""

from collections.abc import Callable

from broker.gateway_side import JobBroker
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys, metrics
from contract.errors import ErrorCode
from contract.spec import JobError, JobResult, JobSpec

SUBMITTED = keys.counter(metrics.STEPS_SUBMITTED.name, "tiny")
ENDED = keys.counter(metrics.STEPS_ENDED.name, "tiny")


async def to_do(gateway: JobBroker) -> int:
    counters = await gateway.counters()
    return counters.get(SUBMITTED, 0) - counters.get(ENDED, 0)


async def test_every_end_takes_off_what_the_job_had_asked_for(
    gateway: JobBroker,
    worker: WorkerBroker,
    make_spec: Callable[..., JobSpec],
    result_of: Callable[[TakenJob], JobResult],
) -> None:
    waiting, failing, succeeding = make_spec(n=1, steps=7), make_spec(n=2, steps=5), make_spec(n=3, steps=4)
    for spec in (succeeding, failing, waiting):
        await gateway.submit(spec)
    await gateway.submit(waiting)  # the same once more: nothing new to do
    assert await to_do(gateway) == 7 + 10 + 12
    first, second = worker.take(2)
    assert await to_do(gateway) == 29  # running is not ended
    jobs = {job.job_id: job for job in (first, second)}
    assert worker.succeed(jobs[succeeding.id], result_of(jobs[succeeding.id]))
    assert await to_do(gateway) == 17
    assert worker.fail(jobs[failing.id], JobError(code=ErrorCode.INTERNAL, detail="no"))
    assert await to_do(gateway) == 7
    await gateway.cancel(waiting.id)
    assert await to_do(gateway) == 0
