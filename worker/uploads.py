"""Finished pictures on their way into the store, which may be away for a while."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog
from PIL import Image

from broker.store import Store, StoreError
from broker.take import TakenJob
from worker.engine.events import Span
from worker.messages import Stored, StoreFailed
from worker.outputs import encode, picture_result
from worker.store_outage import pauses

_AT_WORK: Final = 4

_log = structlog.get_logger("darkroom.worker")


class Uploads:
    """Encodes each picture once and tries to store it for `patience` seconds. At most `room` pictures wait between two
    tries; what comes beyond that waits to be encoded, and whoever makes pictures should make no more (`room_left`).

    `answer` gets `Stored` or `StoreFailed`, or nothing once the job is no longer `held`.
    """

    def __init__(
        self,
        store: Store,
        patience: float,
        room: int,
        held: Callable[[TakenJob], bool],
        answer: Callable[[Stored | StoreFailed], None],
    ) -> None:
        self._store = store
        self._patience = patience
        self._room = room
        self._held = held
        self._answer = answer
        self._pool = ThreadPoolExecutor(room, "upload")
        self._turns = threading.Semaphore(_AT_WORK)  # the others wait for a try: that costs a thread and the file
        self._closing = threading.Event()
        self._waiting = 0
        self._lock = threading.Lock()

    @property
    def room_left(self) -> int:
        return self._room - self._waiting

    def put(self, job: TakenJob, index: int, image: Image.Image, digest: str) -> None:
        with self._lock:
            self._waiting += 1
        self._pool.submit(self._run, job, index, image, digest)

    def close(self) -> None:
        """Ends the waiting: whoever closes has no job left that wants its pictures."""
        self._closing.set()
        self._pool.shutdown()

    def _run(self, job: TakenJob, index: int, image: Image.Image, digest: str) -> None:
        begun = time.monotonic()
        try:
            message: Stored | StoreFailed | None = self._store_patiently(job, index, image, digest, begun)
        except Exception as error:  # noqa: BLE001  # concerns this job only
            message = StoreFailed(job.execution_id, error)
        with self._lock:
            self._waiting -= 1
        if message is not None:
            self._answer(message)

    def _store_patiently(
        self, job: TakenJob, index: int, image: Image.Image, digest: str, begun: float
    ) -> Stored | None:
        """Raises `StoreError` when patience is at its end. The key depends on job, execution and index alone, so that a
        try whose answer was lost does no harm."""
        with self._turns:
            data = encode(image, job.spec, index, digest)
        result = picture_result(job.spec, job.execution_id, index, image.size, data)
        waits = pauses(self._patience)
        while self._held(job):
            try:
                with self._turns:
                    self._store.put(result.key, data, result.content_type)
                return Stored(job.execution_id, result, Span(begun, time.monotonic()))
            except StoreError as error:
                if (pause := next(waits, None)) is None:
                    raise
                _log.warning("store away", job=job.job_id, error=str(error), next_try_in=round(pause, 1))
                if self._closing.wait(pause):
                    break
        return None
