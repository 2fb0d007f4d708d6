"""The worker's threads towards broker and store, so that no step ever waits for the network.

`intake` takes jobs and loads their inputs, `pulse` renews leases and looks for cancels, one reporter writes everything
about jobs in order, and a small pool encodes and uploads. All of them answer through the inbox of the main loop.
"""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Final

import structlog
from PIL import Image

from broker.connection import REDIS_UNAVAILABLE
from broker.stops import Stop
from broker.store import Store, StoreError
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobError, JobResult, JobWarning
from worker.engine.events import Span
from worker.messages import Arrived, Broken, Lost, Message, Stopped, Stored, StoreFailed, TakeEnded
from worker.outputs import encode_preview, store_picture
from worker.requests import BadJobError, load_inputs

_TAKE_SECONDS: Final = 0.01
_STOPS_SECONDS: Final = 0.05
_RETRY_SECONDS: Final = 0.5
_UPLOADS: Final = 4

_log = structlog.get_logger("darkroom.worker")


class BrokerLink:
    """Jobs are held, their leases renewed, from the take until their end has been written."""

    def __init__(self, broker: WorkerBroker, store: Store, settings: Settings, inbox: SimpleQueue[Message]) -> None:
        self._broker = broker
        self._store = store
        self._settings = settings
        self._inbox = inbox
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        self._held: dict[str, TakenJob] = {}
        self._lock = threading.Lock()
        self._taking_ended = threading.Event()
        self._closing = threading.Event()
        self._give_up = math.inf
        self._reporter = ThreadPoolExecutor(1, "reporter")
        self._uploads = ThreadPoolExecutor(_UPLOADS, "upload")
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name=run.__name__.strip("_"), daemon=True)
            for run in (self._intake, self._pulse)
        ]

    def start(self) -> None:
        """The broker is registered already: gateways may send jobs."""
        for thread in self._threads:
            thread.start()

    def want(self, rows: int) -> None:
        """Ask for jobs of about `rows` pictures; each comes as `Arrived`, and `TakeEnded` closes the answer. While the
        queue is empty there is none. Ask again only after it."""
        self._wanted.put(rows)

    def stop_taking(self) -> None:
        """A request that waits is answered with nothing."""
        self._taking_ended.set()
        self._give_up = min(self._give_up, time.monotonic() + self._settings.lease_seconds)

    def close(self) -> None:
        """Waits for uploads and for what is still to be written."""
        self.stop_taking()
        self._wanted.put(None)
        self._uploads.shutdown()
        self._reporter.shutdown()
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def warn(self, job: TakenJob, warnings: tuple[JobWarning, ...]) -> None:
        self._report(self._broker.warn, job, warnings)

    def progress(self, job: TakenJob, step: int, steps: int) -> None:
        self._report(self._broker.progress, job, step, steps)

    def preview(self, job: TakenJob, index: int, step: int, preview: Image.Image) -> None:
        def send() -> None:
            data = encode_preview(preview, job.spec.width, job.spec.height)
            self._broker.preview(job, index, step, data, "image/jpeg")

        self._report(send)

    def upload(self, job: TakenJob, index: int, image: Image.Image, digest: str) -> None:
        """Answered with `Stored` or `StoreFailed`."""
        self._uploads.submit(self._guarded, self._upload, job, index, image, digest)

    def succeed(self, job: TakenJob, result: JobResult) -> None:
        self._end(job, self._broker.succeed, job, result)

    def fail(self, job: TakenJob, error: JobError) -> None:
        self._end(job, self._broker.fail, job, error)

    def end_stopped(self, job: TakenJob, stop: Stop) -> None:
        self._end(job, self._broker.end_stopped, job, stop)

    def hand_back(self, job: TakenJob) -> None:
        self._end(job, self._broker.hand_back, job)

    def _guarded(self, run: Callable[..., None], *args: Any) -> None:
        try:
            run(*args)
        except BaseException as error:  # noqa: BLE001  # a thread must not die in silence
            self._inbox.put(Broken(error))

    def _report(self, call: Callable[..., object], *args: Any) -> None:
        """News that nobody misses when Redis is away."""

        def send() -> None:
            try:
                call(*args)
            except REDIS_UNAVAILABLE as error:
                _log.warning("redis away", call=getattr(call, "__name__", ""), error=str(error))

        self._reporter.submit(self._guarded, send)

    def _end(self, job: TakenJob, call: Callable[..., bool], *args: Any) -> None:
        """Ends are written once Redis is there, however long that takes, and the job is held until then."""

        def send() -> None:
            while True:
                try:
                    written = call(*args)
                    break
                except REDIS_UNAVAILABLE as error:
                    _log.warning("redis away", job=job.job_id, error=str(error))
                    if time.monotonic() > self._give_up:
                        return  # its lease brings the job back
                    time.sleep(_RETRY_SECONDS)
            self._release({job.execution_id})
            _log.info("job ended", job=job.job_id, end=call.__name__, written=written)

        self._reporter.submit(self._guarded, send)

    def _release(self, executions: set[str]) -> None:
        with self._lock:
            for execution_id in executions:
                self._held.pop(execution_id, None)

    def _intake(self) -> None:
        while (rows := self._wanted.get()) is not None:
            taken = 0
            while taken < rows and not self._taking_ended.is_set():
                job = self._take_one()
                if job is not None:
                    self._hold(job)
                    taken += job.spec.n
                    self._load(job)
                elif taken:
                    break
                else:
                    self._taking_ended.wait(_TAKE_SECONDS)
            self._inbox.put(TakeEnded())

    def _take_one(self) -> TakenJob | None:
        """One at a time: a job may have many pictures, and what does not fit here is for other workers."""
        try:
            return next(iter(self._broker.take(1)), None)
        except REDIS_UNAVAILABLE as error:
            _log.warning("redis away", call="take", error=str(error))
            self._taking_ended.wait(_RETRY_SECONDS)
            return None

    def _hold(self, job: TakenJob) -> None:
        with self._lock:
            again = [execution for execution, held in self._held.items() if held.job_id == job.job_id]
            for execution_id in again:
                del self._held[execution_id]
            self._held[job.execution_id] = job
        if again:
            self._inbox.put(Lost(frozenset(again)))

    def _load(self, job: TakenJob) -> None:
        try:
            self._inbox.put(Arrived(job, load_inputs(self._store, job.spec)))
        except BadJobError as error:
            self.fail(job, error.error)
        except StoreError as error:
            _log.error("input not loaded", job=job.job_id, error=str(error))
            self.fail(job, store_unavailable("an input picture could not be read"))

    def _upload(self, job: TakenJob, index: int, image: Image.Image, digest: str) -> None:
        begin = time.monotonic()
        try:
            picture = store_picture(self._store, job.spec, job.execution_id, index, image, digest)
        except Exception as error:  # noqa: BLE001  # concerns this job only
            self._inbox.put(StoreFailed(job.execution_id, error))
        else:
            self._inbox.put(Stored(job.execution_id, picture, Span(begin, time.monotonic())))

    def _pulse(self) -> None:
        beat = sweep = time.monotonic()
        while not self._closing.wait(_STOPS_SECONDS):
            now = time.monotonic()
            try:
                if now >= beat:
                    beat = now + self._settings.heartbeat_seconds
                    self._beat()
                self._look_for_stops()
                if now >= sweep:
                    sweep = now + self._settings.reap_seconds
                    self._broker.sweep()
            except REDIS_UNAVAILABLE as error:
                _log.warning("redis away", call="heartbeat", error=str(error))
                beat = 0.0
                self._closing.wait(_RETRY_SECONDS)

    def _snapshot(self) -> list[TakenJob]:
        with self._lock:
            return list(self._held.values())

    def _beat(self) -> None:
        held = {job.job_id: job for job in self._snapshot()}
        lost = {held[job_id].execution_id for job_id in self._broker.heartbeat(held.values())}
        if lost:
            self._release(lost)
            self._inbox.put(Lost(frozenset(lost)))

    def _look_for_stops(self) -> None:
        held = {job.job_id: job for job in self._snapshot()}
        stops = self._broker.stops(held.values())
        if stops:
            self._inbox.put(Stopped({held[job_id].execution_id: stop for job_id, stop in stops.items()}))


def store_unavailable(what: str) -> JobError:
    return JobError(code=ErrorCode.STORE_UNAVAILABLE, detail=f"{what}: the picture store cannot be reached; try again")
