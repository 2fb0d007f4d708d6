"""Jobs that workers die with: they run alone, they fail when they are at fault, and nobody else suffers."""

import random
from collections.abc import Callable

import pytest
from redis import Redis

from broker.deaths import Deaths
from broker.gateway_side import JobBroker
from broker.reap import Sweeper, Swept
from broker.stops import Stop
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys, metrics
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobResult, JobSpec, JobStatus, Priority

MakeSpec = Callable[..., JobSpec]
MakeWorker = Callable[..., WorkerBroker]
ResultOf = Callable[[TakenJob], JobResult]


@pytest.fixture
def sweeper(redis_client: Redis, settings: Settings) -> Sweeper:
    return Sweeper(redis_client, settings)


async def make_suspects(
    gateway: JobBroker, make_worker: MakeWorker, sweeper: Sweeper, specs: list[JobSpec]
) -> list[JobSpec]:
    """Two workers die with all of `specs`."""
    for spec in specs:
        await gateway.submit(spec)
    for _ in range(2):
        worker = make_worker()
        assert len(worker.take(8)) == len(specs)
        assert sweeper.reap_worker(worker.name) == Swept(returned=len(specs))
    return specs


async def test_the_culprit_fails_and_its_neighbours_succeed(
    gateway: JobBroker, make_worker: MakeWorker, make_spec: MakeSpec, result_of: ResultOf, sweeper: Sweeper
) -> None:
    """Whoever holds the culprit dies."""
    culprit = make_spec(id="culprit")
    specs = [make_spec(), culprit, make_spec(), make_spec(priority="batch")]
    for spec in specs:
        await gateway.submit(spec)
    deaths = 0
    while jobs := (worker := make_worker()).take(8):
        if any(job.job_id == culprit.id for job in jobs):
            deaths += 1
            sweeper.reap_worker(worker.name)
        else:
            assert all(worker.succeed(job, result_of(job)) for job in jobs)
    assert deaths == 4
    for spec in specs:
        record = await gateway.get(spec.id)
        assert record is not None
        assert record.status is (JobStatus.FAILED if spec is culprit else JobStatus.SUCCEEDED)
        if record.error is not None:
            assert record.error.code is ErrorCode.WORKER_LOST
            assert "2 workers in a row died while running this job alone, without progress" in record.error.detail


async def test_a_suspect_is_alone_in_its_worker(
    gateway: JobBroker, make_worker: MakeWorker, make_spec: MakeSpec, result_of: ResultOf, sweeper: Sweeper
) -> None:
    first, second = await make_suspects(gateway, make_worker, sweeper, [make_spec(), make_spec()])
    await gateway.submit(make_spec())
    worker = make_worker()
    (job,) = worker.take(8)
    assert job.alone
    assert worker.take(8) == []
    assert worker.hand_back(job)  # still a suspect afterwards
    (job,) = worker.take(8)
    assert job.alone
    worker.succeed(job, result_of(job))
    (job,) = worker.take(8)
    assert {job.job_id} < {first.id, second.id}
    worker.succeed(job, result_of(job))
    (job,) = worker.take(8)
    assert not job.alone


async def test_a_suspect_waits_for_one_drain_under_constant_load(
    gateway: JobBroker, make_worker: MakeWorker, make_spec: MakeSpec, result_of: ResultOf, sweeper: Sweeper
) -> None:
    """Busy workers see it: one takes nothing more until it is empty, the other goes on."""
    workers = [make_worker(), make_worker()]
    for _ in range(4):
        await gateway.submit(make_spec())
    held = {worker.name: worker.take(2) for worker in workers}
    (suspect,) = await make_suspects(gateway, make_worker, sweeper, [make_spec(id="suspect", priority="batch")])
    ends = 0
    while not any(job.alone for jobs in held.values() for job in jobs):
        for worker in workers:
            await gateway.submit(make_spec())
            jobs = held[worker.name]
            if jobs:
                worker.succeed(jobs[0], result_of(jobs[0]))
                ends += 1
            held[worker.name] = jobs[1:] + worker.take(3 - len(jobs))
    assert ends <= 4
    draining, busy = sorted(workers, key=lambda worker: len(held[worker.name]))
    assert [job.job_id for job in held[draining.name]] == [suspect.id]
    assert len(held[busy.name]) == 2


async def test_only_fruitless_deaths_count(
    gateway: JobBroker, make_worker: MakeWorker, make_spec: MakeSpec, result_of: ResultOf, sweeper: Sweeper
) -> None:
    """An innocent job whose workers are killed all the time."""
    spec = make_spec(steps=50)
    await gateway.submit(spec)
    for step in range(1, 30):
        worker = make_worker()
        (job,) = worker.take(1)
        assert job.resume == ({0: b"%d" % (step - 1)} if step > 1 else {})
        assert worker.save_resume(job, {0: b"%d" % step}, steps=step)
        assert sweeper.reap_worker(worker.name) == Swept(returned=1)
    worker = make_worker()
    (job,) = worker.take(1)
    assert worker.succeed(job, result_of(job))


@pytest.mark.parametrize("seed", range(3))
async def test_under_random_deaths_only_the_culprits_fail(
    gateway: JobBroker,
    make_worker: MakeWorker,
    make_spec: MakeSpec,
    result_of: ResultOf,
    sweeper: Sweeper,
    redis_client: Redis,
    seed: int,
) -> None:
    """Three workers, five jobs of two keys each at a time; every tenth step kills one, a culprit's second always does.
    Every step is saved, so that an innocent job gets on between two deaths."""
    chance = random.Random(seed)
    specs = [make_spec(api_key_id=chance.choice("ab"), priority=chance.choice(list(Priority))) for _ in range(40)]
    culprits = {spec.id for spec in chance.sample(specs, 3)}
    for spec in specs:
        await gateway.submit(spec)
    workers: list[tuple[WorkerBroker, dict[str, tuple[TakenJob, int]]]] = [(make_worker(), {}) for _ in range(3)]
    while redis_client.zcard(keys.ended()) < len(specs):
        place = chance.randrange(3)
        worker, held = workers[place]
        held |= {job.job_id: (job, int(job.resume.get(0, 0))) for job in worker.take(5 - len(held))}
        assert len(held) == 1 or not any(job.alone for job, _ in held.values())
        fatal = chance.random() < 0.1
        for job_id, (job, step) in list(held.items()):
            if job_id in culprits and step == 1:
                fatal = True
            elif step == 8:
                assert worker.succeed(job, result_of(job))
                del held[job_id]
            else:
                held[job_id] = (job, step + 1)
                assert worker.save_resume(job, {0: b"%d" % (step + 1)}, step + 1)
        if fatal and held:
            sweeper.reap_worker(worker.name)
            workers[place] = (make_worker(), {})
    for spec in specs:
        record = await gateway.get(spec.id)
        assert record is not None
        assert record.status is (JobStatus.FAILED if spec.id in culprits else JobStatus.SUCCEEDED)


async def test_a_death_ends_what_was_to_be_stopped(
    gateway: JobBroker, make_worker: MakeWorker, make_spec: MakeSpec, sweeper: Sweeper
) -> None:
    cancelled, late, handed = specs = [make_spec(id=name) for name in ("cancelled", "late", "handed")]
    for spec in specs:
        await gateway.submit(spec)
    worker = make_worker()
    jobs = {job.job_id: job for job in worker.take(8)}
    await gateway.cancel(cancelled.id)
    await gateway.cancel(handed.id)
    assert worker.hand_back(jobs[handed.id])
    worker._redis.hset(keys.job(late.id), "stop", Stop.DEADLINE)
    assert sweeper.reap_worker(worker.name) == Swept(failed=2)
    records = [await gateway.get(spec.id) for spec in specs]
    assert [record.status for record in records if record] == [
        JobStatus.CANCELLED,
        JobStatus.FAILED,
        JobStatus.CANCELLED,
    ]


async def test_steps_done_twice_are_counted(
    gateway: JobBroker, make_worker: MakeWorker, make_spec: MakeSpec, result_of: ResultOf, sweeper: Sweeper
) -> None:
    await gateway.submit(make_spec(steps=20, n=2))
    worker = make_worker()
    (job,) = worker.take(1)
    worker.save_resume(job, {0: b"x", 1: b"y"}, steps=6)
    worker.progress(job, 3, 20, total=11)
    sweeper.reap_worker(worker.name)
    worker = make_worker()
    (job,) = worker.take(1)
    worker.progress(job, 20, 20)
    worker.succeed(job, result_of(job))
    counters = await gateway.counters()
    assert counters[keys.counter(metrics.DENOISING_STEPS.name, "tiny")] == 40
    assert counters[keys.counter(metrics.DENOISING_STEPS_REDONE.name, "tiny")] == 5
    assert counters[keys.counter(metrics.EXECUTIONS_REAPED.name, "tiny")] == 1


def test_a_record_of_deaths_survives_its_hash_and_ends() -> None:
    chance = random.Random(1)
    for _ in range(200):
        deaths, steps = Deaths(), 0
        while deaths.verdict(5) is None:
            steps = min(50, steps + chance.choice((0, 0, 3)))
            deaths = deaths.another(steps)
            fields = {name.encode(): str(value).encode() for name, value in deaths.fields().items()}
            assert Deaths.parse(fields) == deaths
        assert deaths.total >= 4  # two in company, two alone
        assert deaths.total <= 50
