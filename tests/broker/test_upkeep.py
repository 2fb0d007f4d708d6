"""Listing, deletion, retention and the catalogue."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from redis import Redis

from broker.gateway_side import JobBroker
from broker.janitor import Cleaned
from broker.jobs import InvalidCursorError
from broker.store import StoreError
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import JobResult, JobSpec, JobStatus, Priority

MakeSpec = Callable[..., JobSpec]
ResultOf = Callable[[TakenJob], JobResult]


def finish(worker: WorkerBroker, gateway: JobBroker, result_of: ResultOf) -> TakenJob:
    """Takes one job, stores its pictures and succeeds."""
    (job,) = worker.take(1)
    result = result_of(job)
    for picture in result.pictures:
        gateway.store.put(picture.key, b"png", picture.content_type)
    assert worker.succeed(job, result)
    return job


async def test_listing_pages_newest_first(gateway: JobBroker, make_spec: MakeSpec) -> None:
    specs = [make_spec(api_key_id="a") for _ in range(7)]
    for spec in specs:
        await gateway.submit(spec)
    await gateway.submit(make_spec(api_key_id="b"))
    found, cursor, pages = [], None, 0
    while pages == 0 or cursor:
        page = await gateway.list_jobs("a", limit=3, cursor=cursor)
        found += [record.spec.id for record in page.jobs]
        cursor, pages = page.cursor, pages + 1
    assert found == [spec.id for spec in reversed(specs)]
    assert pages == 3
    await gateway.cancel(specs[2].id)
    cancelled = await gateway.list_jobs("a", JobStatus.CANCELLED)
    assert [record.spec.id for record in cancelled.jobs] == [specs[2].id]
    assert (await gateway.list_jobs(None)).jobs == ()
    with pytest.raises(InvalidCursorError):
        await gateway.list_jobs("a", cursor="page 2")


async def test_delete_removes_an_ended_job_and_its_pictures(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, redis_client: Redis
) -> None:
    keep, gone = make_spec(), make_spec()
    await gateway.submit(gone)
    assert await gateway.delete(gone.id) is JobStatus.QUEUED
    finish(worker, gateway, result_of)
    await gateway.submit(keep)
    finish(worker, gateway, result_of)
    assert len(list(gateway.store.list("outputs/"))) == 2
    assert await gateway.delete(gone.id) is JobStatus.SUCCEEDED
    assert await gateway.delete(gone.id) is None
    assert await gateway.get(gone.id) is None
    assert [record.spec.id for record in (await gateway.list_jobs(None)).jobs] == [keep.id]
    assert [entry.key.split("/")[1] for entry in gateway.store.list("outputs/")] == [keep.id]
    assert list(redis_client.scan_iter(f"*{gone.id}*")) == []
    queue = keys.queue_name("tiny", Priority.INTERACTIVE)
    assert redis_client.zrange(f"rq:finished:{queue}", 0, -1) == [keep.id.encode()]


@pytest.fixture
async def forgetful(settings: Settings) -> AsyncIterator[JobBroker]:
    changes = {"retention_seconds": 1, "inputs_retention_seconds": 0, "janitor_seconds": 0.01}
    broker = JobBroker(settings.model_copy(update=changes))
    yield broker
    await broker.close()


async def test_the_janitor_keeps_the_retention_times(
    forgetful: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, redis_client: Redis
) -> None:
    spec = make_spec(task="img2img", inputs={"image": "inputs/with-input/image.png"}, id="with-input")
    for name in ("with-input", "still-waiting"):
        forgetful.store.put(keys.input_object(name, "image"), b"png", "image/png")
    await forgetful.submit(spec)
    job = finish(worker, forgetful, result_of)
    redis_client.zadd(keys.inputs_due(), {job.job_id: time.time() - 1})  # the worker's settings keep them longer
    assert await forgetful.clean() == Cleaned(inputs=1)
    assert [entry.key for entry in forgetful.store.list("inputs/")] == [keys.input_object("still-waiting", "image")]
    assert await forgetful.get(spec.id) is not None
    await asyncio.sleep(1.1)
    assert await forgetful.clean() == Cleaned(jobs=1)
    assert await forgetful.get(spec.id) is None
    assert list(forgetful.store.list("outputs/")) == []


async def test_one_janitor_at_a_time(gateway: JobBroker, settings: Settings, redis_client: Redis) -> None:
    await gateway.clean()
    assert 0 < redis_client.pttl(keys.lock("janitor")) <= settings.janitor_seconds * 1000
    redis_client.zadd(keys.ended(), {"long-gone": 1.0})
    assert await gateway.clean() == Cleaned()
    redis_client.delete(keys.lock("janitor"))
    assert await gateway.clean() == Cleaned(jobs=1)


async def test_inputs_of_no_job_go(gateway: JobBroker, tmp_path: Path, make_spec: MakeSpec) -> None:
    waiting = make_spec(task="img2img", inputs={"image": keys.input_object("job-1", "image")})
    await gateway.submit(waiting)
    for name in (waiting.id, "orphan", "fresh-orphan"):
        gateway.store.put(keys.input_object(name, "image"), b"png", "image/png")
    old = time.time() - 7200
    probe = "checks/0123/probe"
    gateway.store.put(probe, b"of a process that died at its start", "text/plain")
    for key in (keys.input_object(waiting.id, "image"), keys.input_object("orphan", "image"), probe):
        os.utime(tmp_path / "store" / key, (old, old))
    assert await gateway.clean() == Cleaned(orphans=2)
    assert list(gateway.store.list("checks/")) == []
    assert sorted(entry.key.split("/")[1] for entry in gateway.store.list("inputs/")) == ["fresh-orphan", waiting.id]


async def test_one_job_that_cannot_be_deleted_holds_up_no_other(
    forgetful: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, redis_client: Redis
) -> None:
    """Here a link to itself lies among its pictures, which no list gets past."""
    specs = [make_spec() for _ in range(3)]
    for spec in specs:
        await forgetful.submit(spec)
        finish(worker, forgetful, result_of)
        forgetful.store.put(keys.input_object(spec.id, "image"), b"png", "image/png")
    redis_client.zadd(keys.inputs_due(), {spec.id: at for at, spec in enumerate(specs)})
    redis_client.zadd(keys.ended(), {spec.id: at for at, spec in enumerate(specs)})
    assert forgetful.store.folder is not None
    for folder in ("inputs", "outputs"):
        (forgetful.store.folder / folder / specs[0].id / "loop").symlink_to("loop")
    with pytest.raises(StoreError):
        await forgetful.clean()
    assert [await forgetful.get(spec.id) is None for spec in specs] == [False, True, True]
    for folder in ("inputs", "outputs"):
        assert [entry.name for entry in (forgetful.store.folder / folder).iterdir()] == [specs[0].id]


async def test_the_oldest_jobs_go_when_a_local_store_is_over_its_quota(
    settings: Settings, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf
) -> None:
    changes = {"store_quota_bytes": 10, "janitor_seconds": 0.01}
    broker = JobBroker(settings.model_copy(update=changes))
    specs = [make_spec(n=2) for _ in range(3)]
    for spec in specs:
        await broker.submit(spec)
        finish(worker, broker, result_of)  # 6 bytes each
    waiting = make_spec(task="img2img", inputs={"image": keys.input_object("job-4", "image")})
    broker.store.put(waiting.inputs["image"], b"png", "image/png")
    await broker.submit(waiting)
    assert await broker.clean() == Cleaned(over_quota=2)
    assert [await broker.get(spec.id) for spec in specs[:2]] == [None, None]
    assert {entry.key.split("/")[1] for entry in broker.store.list("outputs/")} == {specs[2].id}
    assert len(list(broker.store.list("inputs/"))) == 1
    await asyncio.sleep(0.02)
    assert await broker.clean() == Cleaned()
    await broker.close()


async def test_what_killed_workers_left_in_a_local_store_goes(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, tmp_path: Path
) -> None:
    await gateway.submit(make_spec())
    job = finish(worker, gateway, result_of)
    long_ago = time.time() - 30 * 86400
    left = [f"outputs/{job.job_id}/{job.execution_id}/1.png#3", "outputs/gone/x/0.png", "outputs/fresh/x/0.png#1"]
    for key in left:
        path = tmp_path / "store" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        if "fresh" not in key:
            os.utime(path, (long_ago, long_ago))
    assert await gateway.clean() == Cleaned(orphans=2)
    files = {str(path.relative_to(tmp_path / "store")) for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert files == {keys.output_object(job.job_id, job.execution_id, 0, "png"), left[2]}


async def test_the_catalogue_outlives_its_workers(
    gateway: JobBroker, make_worker: Callable[..., WorkerBroker], card: ModelCard, make_spec: MakeSpec
) -> None:
    assert await gateway.cards() == []
    worker = make_worker(lease_seconds=0.3)
    assert await gateway.cards() == [card]
    (live,) = await gateway.workers()
    assert (live.name, live.models, live.slots, live.running) == (worker.name, ("tiny",), 8, 0)
    await gateway.submit(make_spec())
    await gateway.submit(make_spec(priority="batch"))
    assert await gateway.queue_depths() == {("tiny", Priority.INTERACTIVE): 1, ("tiny", Priority.BATCH): 1}
    worker.heartbeat(worker.take(1))
    assert (await gateway.workers())[0].running == 1
    await asyncio.sleep(0.35)
    assert await gateway.workers() == []
    assert await gateway.cards() == [card]


async def test_an_old_gateway_bears_new_workers(
    gateway: JobBroker, worker: WorkerBroker, make_spec: MakeSpec, result_of: ResultOf, redis_client: Redis
) -> None:
    """What they add is left out; what cannot be understood without it harms nothing else."""
    card = json.loads(redis_client.hget(keys.cards(), "tiny") or b"") | {"from_the_future": [1]}
    redis_client.hset(keys.cards(), "tiny", json.dumps(card))
    redis_client.hset(keys.cards(), "odd", json.dumps(card | {"tasks": ["levitate"]}))
    beat = json.loads(redis_client.get(keys.worker(worker.name)) or b"") | {"from_the_future": 1}
    redis_client.set(keys.worker(worker.name), json.dumps(beat))
    assert [card.name for card in await gateway.cards()] == ["tiny"]
    assert [live.name for live in await gateway.workers()] == [worker.name]
    plain, odd = make_spec(), make_spec()
    for spec in (plain, odd):
        await gateway.submit(spec)
    for job in worker.take(2):
        assert worker.succeed(job, result_of(job))
    for spec, change in ((plain, {"from_the_future": 1}), (odd, {"timings": "none"})):
        result = json.loads(redis_client.hget(keys.job(spec.id), "result") or b"") | change
        redis_client.hset(keys.job(spec.id), "result", json.dumps(result))
    for _ in range(2):
        assert [record.spec.id for record in (await gateway.list_jobs(None)).jobs] == [plain.id]
    assert redis_client.zscore(keys.jobs_of(None), odd.id) is not None, "it comes back with the next gateway"
    assert await gateway.get(odd.id) is None


async def test_the_janitor_does_not_fall_behind(forgetful: JobBroker, redis_client: Redis) -> None:
    """One turn removes all that is due, as long as its time lasts."""
    redis_client.zadd(keys.ended(), {f"job-{number}": number for number in range(250)})
    redis_client.zadd(keys.inputs_due(), {f"job-{number}": number for number in range(150)})
    slow = forgetful._janitor
    slow._settings = slow._settings.model_copy(update={"janitor_seconds": 60.0})
    assert slow.clean() == Cleaned(jobs=250, inputs=150)
    redis_client.zadd(keys.ended(), {f"job-{number}": number for number in range(250)})
    assert [*slow._due(keys.ended(), 250, stop=0.0)] == ["job-0"]
