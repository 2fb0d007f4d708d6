"""RQ's own tools show the truth about our queues, jobs and workers, and harm nothing by looking."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from redis import Redis
from rq import Queue, Worker
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

from broker.gateway_side import JobBroker
from broker.reap import Sweeper
from broker.stops import Stop
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobError, JobResult, JobSpec, JobStatus, Priority

MakeSpec = Callable[..., JobSpec]
MakeWorker = Callable[..., WorkerBroker]
ResultOf = Callable[[TakenJob], JobResult]
INTERACTIVE, BATCH = keys.queue_names("tiny")
ERROR = JobError(code=ErrorCode.INTERNAL, detail="no")


def rq_info(settings: Settings, *options: str) -> str:
    """What the `rq` command prints, in a process of its own."""
    command = [str(Path(sys.executable).with_name("rq")), "info", "-u", settings.redis_url, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def queues_shown(settings: Settings) -> dict[str, list[int]]:
    """Waiting, executing, finished, failed by queue."""
    lines = re.findall(
        r"^queue (\S+) (\d+), (\d+) executing, (\d+) finished, (\d+) failed$", rq_info(settings, "--raw"), re.M
    )
    return {name: [int(number) for number in numbers] for name, *numbers in lines}


def workers_shown(settings: Settings) -> dict[str, tuple[str, int, int]]:
    """State, finished, failed by worker."""
    found = re.findall(
        r"^worker (\S+) \(.*\) (\w+) .*jobs: (\d+) finished, (\d+) failed$", rq_info(settings, "--raw"), re.M
    )
    return {name: (state, int(finished), int(failed)) for name, state, finished, failed in found}


async def statuses(gateway: JobBroker, specs: list[JobSpec]) -> dict[str, list[int]]:
    """The same from our own reading of every job."""
    records = [await gateway.get(spec.id) for spec in specs]
    columns = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED)
    return {
        keys.queue_name("tiny", priority): [
            sum(one is not None and one.status is status and one.spec.priority is priority for one in records)
            for status in columns
        ]
        for priority in Priority
    }  # fmt: skip


async def test_rq_info_agrees_with_us_all_along(
    gateway: JobBroker,
    make_worker: MakeWorker,
    make_spec: MakeSpec,
    result_of: ResultOf,
    settings: Settings,
    redis_client: Redis,
) -> None:
    async def agree() -> dict[str, list[int]]:
        shown = queues_shown(settings)
        assert shown == await statuses(gateway, specs)
        for priority, queue in zip(Priority, (INTERACTIVE, BATCH), strict=True):
            assert shown[queue][0] == (await gateway.queue_depths())["tiny", priority]
        assert sum(numbers[1] for numbers in shown.values()) == await gateway.running()
        return shown

    specs = [make_spec(api_key_id=key) for key in "aaaabbbb"] + [make_spec(priority="batch") for _ in range(3)]
    busy, idle, dead = make_worker(), make_worker(), make_worker()
    for spec in specs:
        await gateway.submit(spec)
    assert await agree() == {INTERACTIVE: [8, 0, 0, 0], BATCH: [3, 0, 0, 0]}
    first, second, third, fourth = busy.take(4)
    assert len(dead.take(2)) == 2
    assert await agree() == {INTERACTIVE: [2, 6, 0, 0], BATCH: [3, 0, 0, 0]}
    busy.succeed(first, result_of(first))
    busy.fail(second, ERROR)
    busy.hand_back(third)
    await gateway.cancel(specs[-1].id)
    assert await agree() == {INTERACTIVE: [3, 3, 1, 1], BATCH: [2, 0, 0, 0]}
    busy.heartbeat([fourth])
    idle.heartbeat([])
    assert workers_shown(settings) == {
        busy.name: ("busy", 1, 1), idle.name: ("idle", 0, 0), dead.name: ("idle", 0, 0)
    }  # fmt: skip
    sweeper = Sweeper(redis_client, settings)
    sweeper.reap_worker(dead.name)
    assert set(workers_shown(settings)) == {busy.name, idle.name}
    assert await agree() == {INTERACTIVE: [5, 1, 1, 1], BATCH: [2, 0, 0, 0]}
    suspects = make_worker()
    suspects.take(2)
    sweeper.reap_worker(suspects.name)  # the two that had died with the other worker
    assert redis_client.llen(keys.suspects(INTERACTIVE)) == 2
    assert await agree() == {INTERACTIVE: [5, 1, 1, 1], BATCH: [2, 0, 0, 0]}
    await gateway.cancel(fourth.job_id)
    assert busy.end_stopped(fourth, Stop.CANCELLED)
    while jobs := idle.take(1):
        idle.succeed(jobs[0], result_of(jobs[0]))
    assert await agree() == {INTERACTIVE: [0, 0, 6, 1], BATCH: [0, 0, 2, 0]}
    assert "2 queues, 0 jobs total" in rq_info(settings, "--only-queues")


async def test_a_worker_that_redis_forgot_is_shown_again(
    gateway: JobBroker, worker: WorkerBroker, settings: Settings, redis_client: Redis
) -> None:
    cards = await gateway.cards()
    redis_client.flushall()  # it came back without its data
    redis_client.hincrby(f"rq:worker:{worker.name}", "successful_job_count", 1)  # a job ended before the next heartbeat
    worker.heartbeat([])
    assert workers_shown(settings) == {worker.name: ("idle", 0, 0)}
    assert await gateway.cards() == cards


async def test_rqs_classes_read_our_jobs(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, redis_client: Redis
) -> None:
    def fetch(spec: JobSpec) -> Job:
        return Job.fetch(spec.id, connection=redis_client, serializer=JSONSerializer)

    good, bad = make_spec(), make_spec(prompt="a secret")
    for spec in (good, bad):
        await gateway.submit(spec)
    queue = Queue(INTERACTIVE, connection=redis_client, serializer=JSONSerializer)
    assert queue.get_job_ids() == [good.id, bad.id]
    assert fetch(bad).description == "txt2img tiny"
    first, second = worker.take(2)
    running = fetch(good)
    assert running.is_started
    assert running.started_at is not None
    assert running.worker_name == worker.name
    assert [execution.id for execution in running.get_executions()] == [first.execution_id]
    worker.succeed(first, result_of(first))
    worker.fail(second, ERROR)
    ended, failed = fetch(good), fetch(bad)
    assert ended.is_finished
    assert ended.return_value() == [result_of(first).pictures[0].key]
    assert ended.started_at is not None
    assert ended.ended_at is not None
    assert ended.started_at <= ended.ended_at
    assert failed.is_failed
    result = failed.latest_result()
    assert result is not None
    assert result.type is Result.Type.FAILED
    assert result.exc_string == "internal: no"
    assert queue.finished_job_registry.get_job_ids() == [good.id]
    assert queue.failed_job_registry.get_job_ids() == [bad.id]
    assert queue.started_job_registry.get_job_ids() == []
    (shown,) = Worker.all(connection=redis_client)
    assert (shown.name, shown.successful_job_count, shown.failed_job_count) == (worker.name, 1, 1)
    assert set(shown.queue_names()) == {INTERACTIVE, BATCH}
