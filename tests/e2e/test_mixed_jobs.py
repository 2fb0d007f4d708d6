"""Gateway, Valkey, one worker and the store, each real and in its own process, under jobs of all kinds at once."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from broker.embedded import free_port
from cli.client import DarkroomClient, Job
from cli.stack import Stack, StackConfig
from contract.spec import Task
from tests.tiny_models import BASE, UPSCALER, save_tiny_models

Request = tuple[Task, dict[str, Any], dict[str, bytes]]
Labels = frozenset[tuple[str, str]]


@pytest.fixture(scope="module")
def metrics_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKROOM_WORKER_METRICS_PORT", str(port))
        patch.setenv("DARKROOM_WORKER_THREADS", "1")
        yield f"http://127.0.0.1:{port}/metrics"


@pytest.fixture(scope="module")
def stack(metrics_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model_dir = tmp_path_factory.mktemp("models")
    save_tiny_models(model_dir)
    with Stack(StackConfig(tmp_path_factory.mktemp("stack"), model_dir, (BASE, UPSCALER))) as running:
        yield running


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def mixed_requests() -> list[Request]:
    """24 jobs: eight of each task, with different steps, guidance, eta, seeds and prompts; two sizes."""
    gradient = Image.radial_gradient("L").resize((64, 64))
    picture = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.point(lambda level: 255 - level)))
    hole = Image.new("L", picture.size)
    hole.paste(255, (16, 8, 48, 40))
    small = picture.resize((24, 20))
    requests: list[Request] = []
    for i in range(8):
        fields = {"prompt": f"{('a cat', 'two dogs', 'a pizza')[i % 3]} on a blue background", "seed": 100 + i}
        fields |= {"steps": 4 + 3 * i, "guidance_scale": (1.0, 2.0, 5.0)[i % 3], "eta": (0.0, 0.0, 0.0, 1.0)[i % 4]}
        side = (64, 48)[i // 6]
        requests += [
            (Task.TXT2IMG, fields | {"width": side, "height": side}, {}),
            (Task.INPAINT, fields | {"strength": (1.0, 0.6)[i % 2]}, {"image": png(picture), "mask": png(hole)}),
            (Task.UPSCALE, fields, {"image": png(small)}),
        ]
    return requests


def submit(url: str, request: Request) -> Job:
    task, fields, pictures = request
    with DarkroomClient(url) as client:
        return client.submit(task, fields, **pictures)


def picture_of(url: str, job: Job) -> Image.Image:
    with DarkroomClient(url) as client:
        for _ in client.follow(job):
            pass
        (finished,) = client.result(job).images
        return Image.open(io.BytesIO(client.download(finished)))


def denoising_steps(request: Request) -> int:
    _, fields, _ = request
    return int(fields["steps"] * fields.get("strength", 1.0))


def differences(one: Image.Image, other: Image.Image) -> int:
    """Largest difference in levels."""
    assert one.size == other.size
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def samples(url: str, name: str) -> dict[Labels, float]:
    """A metric's samples, by their labels."""
    families = text_string_to_metric_families(httpx.get(url).text)
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {frozenset(sample.labels.items()): sample.value for sample in found}


def test_24_mixed_jobs_at_once(stack: Stack, metrics_url: str) -> None:
    requests = mixed_requests()
    assert len(requests) == 24
    with ThreadPoolExecutor(len(requests)) as pool:
        jobs = list(pool.map(lambda request: submit(stack.url, request), requests))
        together = list(pool.map(lambda job: picture_of(stack.url, job), jobs))

    ticks = samples(metrics_url, "darkroom_engine_rows_per_tick_count")
    alone = {
        labels - {("le", "1.0")}: value
        for labels, value in samples(metrics_url, "darkroom_engine_rows_per_tick_bucket").items()
        if ("le", "1.0") in labels
    }
    shared = {labels for labels, count in ticks.items() if count > alone[labels]}
    models = {dict(labels)["model"] for labels in shared}
    assert models == {BASE, UPSCALER}, f"forward passes with several rows, by lane: {shared}"
    rows = samples(metrics_url, "darkroom_engine_rows_per_tick_sum")
    steps = sum(denoising_steps(request) for request in requests)
    assert sum(rows.values()) == steps
    assert sum(ticks.values()) < 0.75 * steps

    for request, picture in zip(requests, together, strict=True):
        assert differences(picture, picture_of(stack.url, submit(stack.url, request))) <= 2, request[:2]
    made = samples(f"{stack.url}/metrics", "darkroom_pictures_total")
    assert {dict(labels)["task"]: value for labels, value in made.items() if value} == {
        "txt2img": 16.0,
        "inpaint": 16.0,
        "upscale": 16.0,
    }
