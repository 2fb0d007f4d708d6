"""Adapters in the public API: listed with their model, checked against it, passed on."""

from collections.abc import Iterator

import httpx
import pytest

from broker.gateway_side import JobBroker
from broker.worker_side import WorkerBroker
from contract.settings import Settings
from contract.spec import LoraUse
from tests.service.conftest import SMALL


@pytest.fixture(autouse=True)
def styled(settings: Settings) -> Iterator[None]:
    """A worker whose model has two adapters."""
    card = SMALL.model_copy(update={"loras": ("film", "neon")})
    broker = WorkerBroker(settings, [card], slots=8)
    broker.register()
    yield
    broker.close()


async def test_models_list_their_adapters(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["loras"] == ["film", "neon"]


async def test_an_unknown_adapter_is_refused_with_those_that_there_are(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a pizza", "loras": [{"name": "film"}, {"name": "noir"}]}
    answer = await client.post("/v1/txt2img", json=body)
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert fault["pointer"] == "/loras/1/name"
    assert "noir is no adapter of darkroom-small; expected one of: film, neon" in fault["detail"]


async def test_an_adapter_given_twice_is_refused(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a pizza", "loras": [{"name": "film"}, {"name": "neon"}, {"name": "film", "weight": 0.0}]}
    answer = await client.post("/v1/txt2img", json=body)
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert fault["pointer"] == "/loras/2/name"
    assert "film is given twice; expected each adapter once" in fault["detail"]


async def test_names_and_weights_reach_the_job(client: httpx.AsyncClient, settings: Settings) -> None:
    body = {"prompt": "a pizza", "loras": [{"name": "film", "weight": 0.5}, {"name": "neon"}]}
    answer = await client.post("/v1/txt2img", json=body)
    assert answer.status_code == 202, answer.text
    assert answer.json()["request"]["loras"] == [{"name": "film", "weight": 0.5}, {"name": "neon", "weight": 1.0}]
    broker = JobBroker(settings)
    record = await broker.get(answer.json()["id"])
    await broker.close()
    assert record is not None
    assert record.spec.loras == (LoraUse(name="film", weight=0.5), LoraUse(name="neon"))
