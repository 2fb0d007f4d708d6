"""The worker's threads towards broker and store, so that no step ever waits for the network.

`Intake` takes jobs and loads their inputs, `Uploads` encodes and stores, one reporter writes everything about jobs in
order, and a pulse renews leases and looks for cancels. All of them answer through the inbox of the main loop.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any, Final

import structlog
from PIL import Image

from broker.connection import REDIS_UNAVAILABLE
from broker.stops import Stop
from broker.store import Store, StoreError
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract.settings import Settings
from contract.spec import JobError, JobResult, JobWarning
from worker.engine.resume import ResumeState
from worker.held import HeldJobs
from worker.intake import Intake
from worker.messages import Broken, Lost, Message, Stopped
from worker.outputs import encode_preview
from worker.uploads import Uploads

_STOPS_SECONDS: Final = 0.05
_RETRY_SECONDS: Final = 0.5
_UPLOADS_PER_SLOT: Final = 4

_log = structlog.get_logger("darkroom.worker")

States = Mapping[int, ResumeState]
_NO_STATES: Final[States] = MappingProxyType({})


class BrokerLink:
    """Jobs are held, their leases renewed, from the take until their end has been written."""

    def __init__(self, broker: WorkerBroker, store: Store, settings: Settings, inbox: SimpleQueue[Message]) -> None:
        self._broker = broker
        self._store = store
        self._settings = settings
        self._inbox = inbox
        self._held = HeldJobs()
        patience = settings.store_patience_seconds
        self._intake = Intake(broker, store, patience, self._held, inbox, self.fail, self.hand_back)
        room = _UPLOADS_PER_SLOT * settings.worker_slots
        self._uploads = Uploads(store, patience, room, self._held.__contains__, inbox.put)
        self._states: dict[str, tuple[dict[int, ResumeState], int]] = {}
        self._states_lock = threading.Lock()
        self._closing = threading.Event()
        self._give_up = math.inf
        self._reporter = ThreadPoolExecutor(1, "reporter")
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name=name, daemon=True)
            for name, run in (("intake", self._intake.run), ("pulse", self._pulse), ("janitor", self._clean))
        ]

    def start(self, stopping: Callable[[], bool]) -> None:
        """Registers the worker as soon as Redis is there, so that gateways may send jobs; nothing once `stopping`."""
        while not stopping():
            try:
                self._broker.register()
            except REDIS_UNAVAILABLE as error:
                _log.warning("redis away", call="register", error=str(error))
                time.sleep(_RETRY_SECONDS)
                continue
            for thread in self._threads:
                thread.start()
            return

    def want(self, rows: int) -> None:
        """See `Intake.want`."""
        self._intake.want(rows)

    @property
    def room_left(self) -> int:
        """Pictures that may still be made before the store has taken some: 0 or less while it is away for long."""
        return self._uploads.room_left

    def stop_taking(self) -> None:
        """A request that waits is answered with nothing."""
        self._intake.stop()
        self._give_up = min(self._give_up, time.monotonic() + self._settings.lease_seconds)

    def close(self) -> None:
        """Waits for what is still to be written, and takes the worker off the lists."""
        self.stop_taking()
        self._intake.close()
        self._uploads.close()
        self._reporter.shutdown()
        self._closing.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        try:
            self._broker.close()
        except REDIS_UNAVAILABLE as error:
            _log.warning("redis away", call="close", error=str(error))

    def warn(self, job: TakenJob, warnings: tuple[JobWarning, ...]) -> None:
        self._report(self._broker.warn, job, warnings)

    def progress(self, job: TakenJob, step: int, steps: int, total: int) -> None:
        self._report(self._broker.progress, job, step, steps, total)

    def preview(self, job: TakenJob, index: int, step: int, preview: Image.Image) -> None:
        def send() -> None:
            data = encode_preview(preview, job.spec.width, job.spec.height)
            self._broker.preview(job, index, step, data, "image/jpeg")

        self._report(send)

    def save_resume(self, job: TakenJob, states: States, steps: int) -> None:
        """As `WorkerBroker.save_resume`. What was not written yet is replaced: a long outage costs no memory."""
        with self._states_lock:
            unwritten, _ = self._states.get(job.execution_id, ({}, 0))
            self._states[job.execution_id] = (unwritten | dict(states), steps)
        self._report(self._save_latest, job)

    def upload(self, job: TakenJob, index: int, image: Image.Image, digest: str) -> None:
        """Answered with `Stored` or `StoreFailed`."""
        self._uploads.put(job, index, image, digest)

    def succeed(self, job: TakenJob, result: JobResult) -> None:
        self._end(job, "succeeded", lambda: self._broker.succeed(job, result))

    def fail(self, job: TakenJob, error: JobError) -> None:
        self._end(job, f"failed: {error.code}", lambda: self._broker.fail(job, error))

    def end_stopped(self, job: TakenJob, stop: Stop) -> None:
        self._end(job, f"stopped: {stop}", lambda: self._broker.end_stopped(job, stop))

    def hand_back(self, job: TakenJob, states: States = _NO_STATES, steps: int = 0) -> None:
        """As `WorkerBroker.hand_back`."""
        self._end(job, "handed back", lambda: self._broker.hand_back(job, _as_bytes(states), steps))

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

    def _save_latest(self, job: TakenJob) -> None:
        with self._states_lock:
            states, steps = self._states.pop(job.execution_id, ({}, 0))
        if states and job in self._held:
            self._broker.save_resume(job, _as_bytes(states), steps)

    def _end(self, job: TakenJob, end: str, write: Callable[[], bool]) -> None:
        """Ends are written once Redis is there, however long that takes, and the job is held until then."""

        def send() -> None:
            while True:
                try:
                    written = write()
                    break
                except REDIS_UNAVAILABLE as error:
                    _log.warning("redis away", job=job.job_id, error=str(error))
                    if time.monotonic() > self._give_up:
                        return  # its lease brings the job back
                    time.sleep(_RETRY_SECONDS)
            self._held.release({job.execution_id})
            _log.info("job ended" if written else "job ended elsewhere", job=job.job_id, end=end)

        self._reporter.submit(self._guarded, send)

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
                    self._sweep()
            except REDIS_UNAVAILABLE as error:
                _log.warning("redis away", call="heartbeat", error=str(error))
                beat = 0.0
                self._closing.wait(_RETRY_SECONDS)

    def _sweep(self) -> None:
        """Of other workers' jobs: whatever is the matter with one of them, ours go on."""
        try:
            self._broker.sweep()
        except REDIS_UNAVAILABLE:
            raise
        except Exception:  # noqa: BLE001  # logged with its traceback, and tried again
            _log.exception("sweep failed")

    def _clean(self) -> None:
        """In a thread of its own: to delete many pictures takes longer than a lease."""
        while not self._closing.wait(self._settings.janitor_seconds):
            try:
                self._broker.clean(self._store)
            except (*REDIS_UNAVAILABLE, StoreError) as error:
                _log.warning("not cleaned", error=str(error))
            except Exception:  # noqa: BLE001  # as above
                _log.exception("cleaning failed")

    def _beat(self) -> None:
        held = self._held.by_id()
        lost = {held[job_id].execution_id for job_id in self._broker.heartbeat(held.values())}
        if lost:
            self._held.release(lost)
            self._inbox.put(Lost(frozenset(lost)))

    def _look_for_stops(self) -> None:
        held = self._held.by_id()
        stops = self._broker.stops(held.values())
        for job_id, stop in stops.items():
            if self._intake.withdraw(held[job_id]):
                self.end_stopped(held[job_id], stop)
        if stops:
            self._inbox.put(Stopped({held[job_id].execution_id: stop for job_id, stop in stops.items()}))


def _as_bytes(states: States) -> dict[int, bytes]:
    return {index: state.to_bytes() for index, state in states.items()}
