"""A worker in a thread of the test, over a real Valkey and a local store."""

import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from PIL import Image

from broker.gateway_side import JobBroker
from broker.jobs import JobRecord
from broker.store import Store
from contract.settings import Settings
from contract.spec import JobSpec
from models.latent_diffusion import LatentDiffusion
from tests.tiny_models import BASE, base_card, upscaler_card
from worker.batch_worker import BatchWorker, ServedModel
from worker.engine.engine import Engine
from worker.measures import WorkerMetrics

SECONDS = 60.0


class RunningWorker:
    """A worker in a thread of its own."""

    def __init__(self, settings: Settings, models: Mapping[str, LatentDiffusion], **engine: Any) -> None:
        self.metrics = WorkerMetrics()
        self.engine = Engine(models, **engine)
        served = {}
        for card in (base_card(), upscaler_card()):
            model = models[card.name]
            served[card.name] = ServedModel(card.model_copy(update={"loras": tuple(model.adapters)}), model)
        self.store = Store(settings.store_url)
        self.worker = BatchWorker(settings, served, self.engine, self.store, self.metrics)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            self.worker.work()
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def stop(self) -> None:
        self.worker.stop()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


async def ended(gateway: JobBroker, spec: JobSpec) -> JobRecord:
    record = await gateway.wait(spec.id, SECONDS)
    assert record is not None
    assert record.status.ended, f"{spec.id} is still {record.status}"
    return record


def stored(store: Store, record: JobRecord, index: int = 0) -> Image.Image:
    assert record.result is not None, record.error
    return Image.open(io.BytesIO(store.get(record.result.pictures[index].key)))


@contextmanager
def slow(models: Mapping[str, LatentDiffusion], seconds: float) -> Iterator[None]:
    """Every forward pass of the tiny model takes as long as one of a real model."""
    handle = models[BASE].unet.conv_out.register_forward_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


StartWorker = Callable[..., RunningWorker]
