"""A local store that refuses one job's folder for a while: a file stands in the folder's place."""

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from PIL import Image

from broker.store import Store, StoreError
from broker.take import TakenJob
from contract.spec import JobSpec
from worker.messages import Stored, StoreFailed
from worker.uploads import Uploads

SECONDS = 30.0
ROOM = 3
Start = Callable[..., Uploads]


@pytest.fixture
def answers() -> SimpleQueue[Stored | StoreFailed]:
    return SimpleQueue()


@pytest.fixture
def start(tmp_path: Path, answers: SimpleQueue[Stored | StoreFailed]) -> Iterator[Start]:
    started: list[Uploads] = []

    def make(patience: float, held: Callable[[TakenJob], bool] = lambda _: True) -> Uploads:
        started.append(Uploads(Store(f"file:{tmp_path}"), patience, ROOM, held, answers.put))
        return started[-1]

    yield make
    for uploads in started:
        uploads.close()


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (8, 8), "red")


def refuse(folder: Path, spec: JobSpec) -> Path:
    place = folder / "outputs" / spec.id
    place.parent.mkdir(exist_ok=True)
    place.touch()
    return place


def test_a_refused_picture_is_stored_later_and_holds_up_no_other(
    start: Start,
    answers: SimpleQueue[Stored | StoreFailed],
    make_spec: Callable[..., JobSpec],
    image: Image.Image,
    tmp_path: Path,
) -> None:
    refused, other = (TakenJob(make_spec(), execution_id, 0.0) for execution_id in ("e1", "e2"))
    place = refuse(tmp_path, refused.spec)
    uploads = start(patience=SECONDS)
    for _ in range(2):
        uploads.put(refused, 0, image, "")
    uploads.put(other, 0, image, "")
    first = answers.get(timeout=SECONDS)
    assert isinstance(first, Stored)
    assert first.execution_id == "e2"
    assert uploads.room_left == ROOM - 2
    place.unlink()
    for _ in range(2):
        late = answers.get(timeout=SECONDS)
        assert isinstance(late, Stored)
        assert (tmp_path / late.picture.key).stat().st_size == late.picture.bytes
    assert uploads.room_left == ROOM


def test_patience_ends(
    start: Start,
    answers: SimpleQueue[Stored | StoreFailed],
    make_spec: Callable[..., JobSpec],
    image: Image.Image,
    tmp_path: Path,
) -> None:
    job = TakenJob(make_spec(), "e1", 0.0)
    refuse(tmp_path, job.spec)
    start(patience=0.3).put(job, 0, image, "")
    answer = answers.get(timeout=SECONDS)
    assert isinstance(answer, StoreFailed)
    assert isinstance(answer.error, StoreError)


def test_a_job_that_is_gone_is_not_waited_for(
    start: Start,
    answers: SimpleQueue[Stored | StoreFailed],
    make_spec: Callable[..., JobSpec],
    image: Image.Image,
    tmp_path: Path,
) -> None:
    job = TakenJob(make_spec(), "e1", 0.0)
    refuse(tmp_path, job.spec)
    held = iter((True, True, False))
    uploads = start(patience=SECONDS, held=lambda _: next(held))
    uploads.put(job, 0, image, "")
    uploads.close()
    assert answers.empty()
    assert uploads.room_left == ROOM
