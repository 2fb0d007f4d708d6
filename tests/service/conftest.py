"""A real gateway on a loopback port, over real Valkey; and a worker that finishes jobs without a model."""

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hashlib import sha256

import httpx
import pytest
from PIL import Image
from redis import Redis

from broker.store import Store
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.card import ModelCard, Vocabulary
from contract.settings import Settings
from contract.spec import JobResult, PictureResult, Task, Timings
from service.main import GatewayServer, server_config

SMALL = ModelCard(
    name="darkroom-small",
    tasks=(Task.TXT2IMG, Task.IMG2IMG, Task.INPAINT),
    default_width=128,
    default_height=128,
    max_width=256,
    max_height=256,
    size_multiple=32,
    latent_downsample=8,
    default_steps={Task.TXT2IMG: 20, Task.IMG2IMG: 20, Task.INPAINT: 24},
    default_guidance={Task.TXT2IMG: 3.0, Task.IMG2IMG: 3.0, Task.INPAINT: 2.5},
    vocabulary=Vocabulary(objects=("pizza", "panda"), colours=("red", "blue")),
)
X4 = ModelCard(
    name="darkroom-small-x4",
    tasks=(Task.UPSCALE,),
    default_width=512,
    default_height=512,
    max_width=512,
    max_height=512,
    size_multiple=16,
    latent_downsample=4,
    default_steps={Task.UPSCALE: 10},
    default_guidance={Task.UPSCALE: 1.0},
    upscale_factor=4,
    default_noise_level=20,
    max_noise_level=350,
)
PLAIN_X4 = X4.model_copy(update={"name": "plain-x4", "default_noise_level": None, "max_noise_level": None})
CLASSES = ModelCard(
    name="imagenet",
    tasks=(Task.TXT2IMG, Task.IMG2IMG),
    conditioning="class",
    classes=1000,
    default_width=256,
    default_height=256,
    max_width=512,
    max_height=512,
    size_multiple=32,
    latent_downsample=4,
    default_steps={Task.TXT2IMG: 20, Task.IMG2IMG: 20},
    default_guidance={Task.TXT2IMG: 3.0, Task.IMG2IMG: 3.0},
)
_ONE_TASK = {"tasks": (Task.TXT2IMG,), "default_steps": {Task.TXT2IMG: 50}, "default_guidance": {Task.TXT2IMG: 1.0}}
LAYOUT = CLASSES.model_copy(
    update={**_ONE_TASK, "name": "layout", "conditioning": "layout", "classes": 20, "max_objects": 3}
)
SEMANTIC = CLASSES.model_copy(update={**_ONE_TASK, "name": "semantic", "conditioning": "semantic", "classes": 182})
FACES = CLASSES.model_copy(update={**_ONE_TASK, "name": "faces", "conditioning": "none", "classes": None})


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """A gateway behind uvicorn in this event loop; yields its URL."""
    config = server_config(settings, host="127.0.0.1", port=0, log_level="warning", loop="none")
    server = GatewayServer(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        assert not running.done(), "the gateway did not start"
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


@pytest.fixture(name="serving")
def serving_fixture() -> Callable[[Settings], AbstractAsyncContextManager[str]]:
    """For gateways with other settings."""
    return serving


@pytest.fixture
async def url(settings: Settings) -> AsyncIterator[str]:
    async with serving(settings) as address:
        yield address


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=20.0) as http:
        yield http


@pytest.fixture
def worker(settings: Settings) -> Iterator[WorkerBroker]:
    """Registered, so that the models are known; it does nothing by itself."""
    broker = WorkerBroker(settings, [SMALL, X4, PLAIN_X4, CLASSES, LAYOUT, SEMANTIC, FACES], slots=8)
    broker.register()
    yield broker
    broker.close()


class Painter:
    """Finishes jobs in a thread through the worker's own broker: flat pictures of the right size, truly stored."""

    def __init__(self, broker: WorkerBroker, settings: Settings) -> None:
        self.broker = broker
        self.store = Store(settings.store_url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="painter")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(0.005):
            for job in self.broker.take(8):
                self.paint(job)

    def paint(self, job: TakenJob) -> None:
        for name in job.spec.inputs.values():
            Image.open(io.BytesIO(self.store.get(name))).verify()
        self.broker.progress(job, job.spec.steps, job.spec.steps)
        pictures = tuple(self._picture(job, index) for index in range(job.spec.n))
        assert self.broker.succeed(job, JobResult(pictures=pictures, timings=Timings(denoise=0.1)))

    def _picture(self, job: TakenJob, index: int) -> PictureResult:
        spec, file = job.spec, io.BytesIO()
        Image.new("RGB", (spec.width, spec.height), (200, 30 * index, 40)).save(file, spec.output_format.value)
        key = keys.output_object(spec.id, job.execution_id, index, spec.output_format.value)
        self.store.put(key, file.getvalue(), spec.output_format.content_type)
        return PictureResult(
            index=index,
            seed=spec.picture_seed(index),
            key=key,
            width=spec.width,
            height=spec.height,
            content_type=spec.output_format.content_type,
            bytes=len(file.getvalue()),
            sha256=sha256(file.getvalue()).hexdigest(),
        )


@pytest.fixture
def painter(worker: WorkerBroker, settings: Settings) -> Iterator[Painter]:
    painting = Painter(worker, settings)
    yield painting
    painting.stop()


@pytest.fixture
def queued(redis_client: Redis) -> Callable[[], int]:
    """How many jobs wait."""

    def count() -> int:
        return sum(redis_client.llen(key) for key in redis_client.scan_iter("rq:queue:*"))

    return count
