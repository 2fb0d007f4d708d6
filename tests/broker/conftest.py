"""Both sides of the broker over the same Valkey."""

from collections.abc import Callable, Iterator

import pytest

from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import JobResult, PictureResult, Task

MakeWorker = Callable[..., WorkerBroker]


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(
        name="tiny",
        tasks=(Task.TXT2IMG,),
        default_width=64,
        default_height=64,
        max_width=128,
        max_height=128,
        size_multiple=8,
        latent_downsample=8,
        default_steps={Task.TXT2IMG: 4},
        default_guidance={Task.TXT2IMG: 3.0},
    )


@pytest.fixture
def make_worker(settings: Settings, card: ModelCard) -> Iterator[MakeWorker]:
    """Registered workers for the model "tiny"; settings may be changed per worker."""
    workers: list[WorkerBroker] = []

    def make(**changes: float) -> WorkerBroker:
        worker = WorkerBroker(settings.model_copy(update=changes), [card], slots=8)
        workers.append(worker)
        worker.register()
        return worker

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def worker(make_worker: MakeWorker) -> WorkerBroker:
    return make_worker()


def result_of(job: TakenJob) -> JobResult:
    """A result whose pictures name the execution, so that a doubled result shows."""
    pictures = tuple(
        PictureResult(
            index=i,
            seed=job.spec.picture_seed(i),
            key=f"outputs/{job.job_id}/{job.execution_id}/{i}.png",
            width=job.spec.width,
            height=job.spec.height,
            content_type="image/png",
            bytes=3,
            sha256="0" * 64,
        )
        for i in range(job.spec.n)
    )
    return JobResult(pictures=pictures)


@pytest.fixture(name="result_of")
def result_of_fixture() -> Callable[[TakenJob], JobResult]:
    return result_of
