"""The worker's thread that takes jobs and loads their input pictures."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

import structlog

from broker.connection import REDIS_UNAVAILABLE
from broker.store import Store, StoreError
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract.spec import JobError
from worker.held import HeldJobs
from worker.messages import Arrived, Lost, Message, TakeEnded
from worker.requests import BadJobError, load_inputs
from worker.store_outage import pauses, store_unavailable

_IDLE_SECONDS: Final = 0.01
_BUSY_SECONDS: Final = 0.04  # about a step: asking more often would only take time from the computing thread
_RETRY_SECONDS: Final = 0.5

_log = structlog.get_logger("darkroom.worker")


class Intake:
    """Takes when asked (`want`). While the store is away, a job that needs pictures waits here for up to `patience`
    seconds, and no other is taken; the main loop has not heard of it, so it is ended from here."""

    def __init__(
        self,
        broker: WorkerBroker,
        store: Store,
        patience: float,
        held: HeldJobs,
        inbox: SimpleQueue[Message],
        fail: Callable[[TakenJob, JobError], None],
        hand_back: Callable[[TakenJob], None],
    ) -> None:
        self._broker = broker
        self._store = store
        self._patience = patience
        self._held = held
        self._inbox = inbox
        self._fail = fail
        self._hand_back = hand_back
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._loading: TakenJob | None = None

    def want(self, rows: int) -> None:
        """Ask for jobs of about `rows` pictures; each comes as `Arrived`, and `TakeEnded` closes the answer. While the
        queue is empty there is none. Ask again only after it."""
        self._wanted.put(rows)

    def stop(self) -> None:
        """A request that waits is answered with nothing; a job whose pictures cannot be loaded now is handed back."""
        self._ended.set()

    def close(self) -> None:
        """Lets `run` return."""
        self._wanted.put(None)

    def run(self) -> None:
        while (rows := self._wanted.get()) is not None:
            taken = 0
            while taken < rows and not self._ended.is_set():
                job = self._take_one()
                if job is not None:
                    taken += job.spec.n
                    self._bring(job)
                elif taken:
                    break
                else:
                    self._ended.wait(_BUSY_SECONDS if self._held else _IDLE_SECONDS)
            self._inbox.put(TakeEnded())

    def withdraw(self, job: TakenJob) -> bool:
        """True if the job is still being loaded: the main loop will not hear of it, and the caller ends it."""
        with self._lock:
            if self._loading is not job:
                return False
            self._loading = None
            return True

    def _take_one(self) -> TakenJob | None:
        """One at a time: a job may have many pictures, and what does not fit here is for other workers."""
        try:
            return next(iter(self._broker.take(1)), None)
        except REDIS_UNAVAILABLE as error:
            _log.warning("redis away", call="take", error=str(error))
            self._ended.wait(_RETRY_SECONDS)
            return None

    def _bring(self, job: TakenJob) -> None:
        if again := self._held.add(job):
            self._inbox.put(Lost(again))
        self._loading = job
        outcome = self._load(job)
        with self._lock:
            ours = self._loading is job and job in self._held
            self._loading = None
            if ours and isinstance(outcome, Arrived):
                self._inbox.put(outcome)
        if ours and isinstance(outcome, JobError):
            self._fail(job, outcome)
        elif ours and outcome is None:
            self._hand_back(job)

    def _load(self, job: TakenJob) -> Arrived | JobError | None:
        """None: not now, or the job is not ours any more."""
        waits = pauses(self._patience)
        while self._loading is job and job in self._held:
            try:
                return Arrived(job, load_inputs(self._store, job.spec))
            except BadJobError as error:
                return error.error
            except StoreError as error:
                if (pause := next(waits, None)) is None:
                    return store_unavailable("an input picture could not be read", error)
                _log.warning("store away", job=job.job_id, error=str(error), next_try_in=round(pause, 1))
                if self._ended.wait(pause):
                    return None
        return None
