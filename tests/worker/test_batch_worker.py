"""The main loop over a real Valkey and a local store, with tiny models; the gateway's side is the real one, too."""

import asyncio
import io
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from broker.gateway_side import JobBroker
from broker.store import Store
from contract import keys
from contract.errors import ErrorCode
from contract.events import PreviewEvent, ProgressEvent
from contract.settings import Settings
from contract.spec import JobSpec, JobStatus, OutputFormat, Priority, Task
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from tests.tiny_models import BASE, UPSCALER
from tests.worker.running import SECONDS, StartWorker, ended, slow, stored
from worker.batch_worker import run
from worker.engine.engine import Engine

MakeSpec = Callable[..., JobSpec]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def same(one: Image.Image, other: Image.Image) -> bool:
    """Within 2 levels."""
    return one.size == other.size and bool(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 2)


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


async def test_a_job_of_three_pictures(
    gateway: JobBroker,
    start_worker: StartWorker,
    make_spec: MakeSpec,
    store: Store,
    models: Mapping[str, LatentDiffusion],
) -> None:
    worker = start_worker(preview_seconds=0.0)
    spec = make_spec(n=3, steps=5, prompt="a cat", eta=0.5)
    await gateway.submit(spec)
    record = await ended(gateway, spec)
    assert record.result is not None
    assert [picture.seed for picture in record.result.pictures] == [7, 8, 9]
    for index, picture in enumerate(record.result.pictures):
        assert picture.key == f"outputs/{spec.id}/{picture.key.split('/')[2]}/{index}.png"
        data = store.get(picture.key)
        assert (picture.bytes, picture.content_type) == (len(data), "image/png")
        image = stored(store, record, index)
        request = PictureRequest("txt2img", "a cat", 64, 64, 7 + index, steps=5, guidance_scale=3.0, eta=0.5)
        assert same(image, models[BASE].render(request))
    timings = record.result.timings
    assert min(timings.denoise, timings.decode, timings.store) > 0
    async with aclosing(gateway.follow(spec.id)) as events:
        streamed = [one async for one in events]
    types = [one.event.type for one in streamed]
    assert (types[:2], types[-1]) == (["queued", "started"], "succeeded")
    progress = [one.event for one in streamed if isinstance(one.event, ProgressEvent)]
    assert progress[-1] == ProgressEvent(step=5, steps=5)
    assert any(isinstance(one.event, PreviewEvent) for one in streamed)
    lane = {"model": BASE, "lane": "8x8 guided"}
    registry = worker.metrics.registry
    assert sample(registry, "darkroom_engine_rows_per_tick_sum", **lane) == 15
    assert sample(registry, "darkroom_engine_ticks_total", **lane) < 15
    stage = {"model": BASE, "task": "txt2img", "stage": "denoise"}
    assert sample(registry, "darkroom_stage_seconds_count", **stage) == 1


async def test_every_task_with_its_inputs(
    gateway: JobBroker,
    start_worker: StartWorker,
    make_spec: MakeSpec,
    store: Store,
    picture: Image.Image,
    mask: Image.Image,
    models: Mapping[str, LatentDiffusion],
) -> None:
    for name, image in (("image", picture), ("mask", mask)):
        store.put(keys.input_object("shared", name), png(image), "image/png")
    size = {"width": picture.width, "height": picture.height}
    inputs = {name: keys.input_object("shared", name) for name in ("image", "mask")}
    image_only = {"image": inputs["image"]}
    specs = {
        "img2img": make_spec(task=Task.IMG2IMG, inputs=image_only, strength=0.6, **size),
        "inpaint": make_spec(task=Task.INPAINT, inputs=inputs, **size),
        "upscale": make_spec(
            task=Task.UPSCALE, model=UPSCALER, inputs=image_only, width=200, height=148, guidance_scale=1.0
        ),
    }
    for spec in specs.values():
        await gateway.submit(spec)
    start_worker()
    for task, spec in specs.items():
        record = await ended(gateway, spec)
        request = PictureRequest(
            task,  # type: ignore[arg-type]
            spec.prompt,
            spec.width,
            spec.height,
            spec.seed,
            spec.steps,
            spec.guidance_scale,
            strength=spec.strength,
            image=picture,
            mask=mask if task == "inpaint" else None,
            noise_level=20 if task == "upscale" else 0,
        )
        assert same(stored(store, record), models[spec.model].render(request)), task


async def test_a_bad_job_fails_alone_with_its_code(
    gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec, store: Store, picture: Image.Image
) -> None:
    store.put("inputs/x/text.png", b"no picture", "image/png")
    store.put("inputs/x/cut.png", png(picture)[:100], "image/png")
    store.put("inputs/x/image.png", png(picture), "image/png")
    small = {"width": picture.width, "height": picture.height}
    bad = {
        ErrorCode.INPUT_MISSING: [make_spec(task="img2img", inputs={"image": "inputs/x/gone.png"}, **small)],
        ErrorCode.IMAGE_INVALID: [
            make_spec(task="img2img", inputs={"image": "inputs/x/text.png"}, **small),
            make_spec(task="img2img", inputs={"image": "inputs/x/cut.png"}, **small),
        ],
        ErrorCode.VALIDATION_FAILED: [
            make_spec(task="img2img", inputs={"image": "inputs/x/image.png"}, strength=0.5, width=64, height=64),
            make_spec(task="upscale", inputs={"image": "inputs/x/image.png"}, width=200, height=148),
            make_spec(loras=[{"name": "style"}]),
        ],
    }
    good = [make_spec() for _ in range(2)]
    for spec in [good[0], *(spec for specs in bad.values() for spec in specs), good[1]]:
        await gateway.submit(spec)
    start_worker()
    for code, specs in bad.items():
        for spec in specs:
            record = await ended(gateway, spec)
            assert record.error is not None
            assert record.error.code is code, record.error
    for spec in good:
        assert (await ended(gateway, spec)).status is JobStatus.SUCCEEDED


async def test_warnings_name_the_words(gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec) -> None:
    long = " ".join(["cat"] * 22 + ["pizza", "cats"])
    odd = make_spec(prompt="a cat and a Zyzzyva", negative_prompt="qwertz")
    fine = make_spec(prompt="a cat on a blue background")
    cut = make_spec(prompt=long)
    for spec in (odd, fine, cut):
        await gateway.submit(spec)
    start_worker()
    records = [await ended(gateway, spec) for spec in (odd, fine, cut)]
    found = [[(one.code, one.message) for one in record.result.warnings] for record in records if record.result]
    assert found == [
        [
            ("unknown_words", "tiny does not know these words of prompt: zyzzyva"),
            ("unknown_words", "tiny does not know these words of negative_prompt: qwertz"),
        ],
        [],
        [("prompt_truncated", "tiny reads 22 tokens; lost from the end of prompt: pizza cats")],
    ]


def wait_until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + SECONDS
    while not engine.idle:
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def until_running(gateway: JobBroker, spec: JobSpec) -> None:
    async with asyncio.timeout(SECONDS), aclosing(gateway.follow(spec.id)) as events:
        async for one in events:
            if one.event.type == "progress":
                return


async def test_cancel_and_deadline_end_within_a_step_or_so(
    gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec, models: Mapping[str, LatentDiffusion]
) -> None:
    long, late, short = make_spec(steps=900), make_spec(steps=901, deadline_seconds=1.0), make_spec(steps=8)
    with slow(models, 0.02):
        worker = start_worker()
        await gateway.submit(long)
        await gateway.submit(late)
        await until_running(gateway, long)
        await gateway.cancel(long.id)
        asked = time.monotonic()
        assert (await ended(gateway, long)).status is JobStatus.CANCELLED
        assert time.monotonic() - asked < 3.0
        record = await ended(gateway, late)
        assert record.error is not None
        assert record.error.code is ErrorCode.DEADLINE_EXCEEDED
        await gateway.submit(short)
        assert (await ended(gateway, short)).status is JobStatus.SUCCEEDED
        assert worker.engine.idle


async def test_stop_finishes_what_has_begun_and_hands_the_rest_back(
    gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec, models: Mapping[str, LatentDiffusion]
) -> None:
    with slow(models, 0.05):
        worker = start_worker(buckets=(1,), capacity=2)
        begun, waiting = make_spec(steps=12), make_spec(steps=3)
        await gateway.submit(begun)
        await until_running(gateway, begun)
        await gateway.submit(waiting)
        await asyncio.to_thread(worker.stop)
    records = [await gateway.get(spec.id) for spec in (begun, waiting)]
    assert [record and record.status for record in records] == [JobStatus.SUCCEEDED, JobStatus.QUEUED]
    assert await gateway.workers() == []
    start_worker()
    assert (await ended(gateway, waiting)).status is JobStatus.SUCCEEDED


async def test_a_stop_out_of_patience_hands_back_running_jobs(
    gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec, models: Mapping[str, LatentDiffusion]
) -> None:
    spec = make_spec(steps=900, n=2)
    with slow(models, 0.02):
        worker = start_worker(drain_seconds=0.2)
        await gateway.submit(spec)
        await until_running(gateway, spec)
        await asyncio.to_thread(worker.stop)
    record = await gateway.get(spec.id)
    assert record is not None
    assert record.status is JobStatus.QUEUED
    assert record.queue_position == 0


async def test_a_lost_job_is_dropped(
    gateway: JobBroker,
    start_worker: StartWorker,
    make_spec: MakeSpec,
    models: Mapping[str, LatentDiffusion],
    settings: Settings,
) -> None:
    """As when the worker was frozen for longer than its lease: the job goes back, and its rows leave the engine."""
    from broker.connection import connect

    spec = make_spec(steps=900)
    with slow(models, 0.02), connect(settings.redis_url) as redis:
        worker = start_worker()
        await gateway.submit(spec)
        await until_running(gateway, spec)
        (member,) = redis.zrange(keys.leases(), 0, -1)
        redis.zrem(keys.leases(), member)
        await asyncio.to_thread(wait_until_idle, worker.engine)


async def test_interactive_jobs_overtake_batch_jobs(
    gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec, models: Mapping[str, LatentDiffusion]
) -> None:
    batch = [make_spec(steps=4, priority=Priority.BATCH) for _ in range(4)]
    urgent = make_spec(steps=4)
    for spec in [*batch, urgent]:
        await gateway.submit(spec)
    with slow(models, 0.02):
        start_worker(buckets=(1,), capacity=1)
        finished = {spec.id: (await ended(gateway, spec)).finished_at or 0.0 for spec in [*batch, urgent]}
    assert min(finished, key=lambda job_id: finished[job_id]) == urgent.id


@pytest.mark.parametrize("output_format", list(OutputFormat))
async def test_formats(
    gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec, store: Store, output_format: OutputFormat
) -> None:
    spec = make_spec(output_format=output_format, steps=1)
    await gateway.submit(spec)
    start_worker()
    image = stored(store, await ended(gateway, spec))
    assert image.format == output_format.value.upper()


def test_the_rq_function_refuses_to_run() -> None:
    from broker.rq_surface import JOB_FUNCTION

    assert f"{run.__module__}.{run.__name__}" == JOB_FUNCTION
    with pytest.raises(RuntimeError, match="darkroom worker"):
        run({})
