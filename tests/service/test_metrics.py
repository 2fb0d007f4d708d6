"""What `/metrics` shows beside the figures that `test_operations` reads: refusals, waits, what has not happened yet."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.embedded import EmbeddedValkey
from broker.worker_side import WorkerBroker
from contract import metrics
from contract.errors import ErrorCode
from contract.metrics import Metric
from contract.settings import Settings

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]


async def shown(client: httpx.AsyncClient) -> dict[str, list[tuple[dict[str, str], float]]]:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


async def counted(client: httpx.AsyncClient, metric: Metric, label: str) -> dict[str, float]:
    """What is not 0."""
    return {labels[label]: value for labels, value in (await shown(client))[metric.name] if value}


@pytest.fixture
async def client(settings: Settings, serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    short = settings.model_copy(update={"max_queue_depth": 1})
    async with serving(short) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
        yield http


async def test_refusals_count_by_their_code(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    for body, status in (({"prompt": "a"}, 202), ({"prompt": "a"}, 429), ({"steps": 0}, 422), ({"steps": 0}, 422)):
        assert (await client.post("/v1/txt2img", json=body)).status_code == status
    await client.get("/v1/jobs/none")
    await client.get("/nowhere")
    assert (await client.post("/v1/txt2img", content="a")).status_code == 415
    assert await counted(client, metrics.HTTP_PROBLEMS, "code") == {
        ErrorCode.QUEUE_FULL: 1,
        ErrorCode.VALIDATION_FAILED: 2,
        ErrorCode.JOB_NOT_FOUND: 1,
        ErrorCode.NOT_FOUND: 1,
        ErrorCode.UNSUPPORTED_MEDIA_TYPE: 1,
    }


async def test_waits_show_the_oldest_job(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    assert await counted(client, metrics.QUEUE_OLDEST, "model") == {}
    await client.post("/v1/txt2img", json={"prompt": "a"})
    first = await counted(client, metrics.QUEUE_OLDEST, "model")
    assert set(first) == {"darkroom-small"}
    await client.post("/v1/txt2img", json={"prompt": "a", "priority": "batch"})
    ages = {
        (labels["model"], labels["priority"]): value
        for labels, value in (await shown(client))[metrics.QUEUE_OLDEST.name]
        if value
    }
    assert ages["darkroom-small", "interactive"] > max(first["darkroom-small"], ages["darkroom-small", "batch"])
    (job,) = worker.take(1)
    worker.hand_back(job)
    again = await counted(client, metrics.QUEUE_OLDEST, "priority")
    assert again["interactive"] > ages["darkroom-small", "interactive"]


async def test_what_has_not_happened_is_there_with_0(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    samples = await shown(client)
    for metric in metrics.REDIS_COUNTERS:
        assert {value for labels, value in samples[metric.name] if labels["model"] == "darkroom-small"} == {0.0}
    assert {labels["code"] for labels, _ in samples[metrics.HTTP_PROBLEMS.name]} == set(ErrorCode)


async def test_everything_shown_is_in_the_contract(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    await client.get("/healthz")
    names = {name for metric in metrics.ALL for name in metrics.sample_names(metric)}
    others = {name for name in await shown(client) if not name.startswith(f"{metrics.PROCESS_NAMESPACE}_process_")}
    assert others <= names


async def test_redis_away_is_a_figure(settings: Settings, serving: Serving) -> None:
    with EmbeddedValkey() as server:
        away = settings.model_copy(update={"redis_url": server.url})
        async with serving(away) as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
            assert (await shown(http))[metrics.REDIS_UP.name] == [({}, 1.0)]
            server.stop()
            samples = await shown(http)
    assert samples[metrics.REDIS_UP.name] == [({}, 0.0)]
    assert metrics.RUNNING.name not in samples
