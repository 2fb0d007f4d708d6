"""The worker's main loop: jobs from the broker become rows of the engine, its events become progress and results."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import MappingProxyType
from typing import Any, Final, NoReturn

import structlog

from broker.store import Store
from broker.worker_side import WorkerBroker
from contract.card import ModelCard
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobError, Priority
from models.latent_diffusion import LatentDiffusion
from worker.engine.engine import Engine
from worker.engine.events import (
    Event,
    LaneTicked,
    RowFailed,
    RowFinished,
    RowHandedBack,
    RowProgress,
)
from worker.engine.resume import ResumeState
from worker.errors import begin_error, row_error, store_error
from worker.jobs import RunningJob
from worker.link import BrokerLink
from worker.measures import WorkerMetrics
from worker.messages import Arrived, Broken, Lost, Message, Stopped, Stored, StoreFailed, TakeEnded, Wake
from worker.requests import job_warnings, picture_requests

_NEWS_SECONDS: Final = 0.1
_IDLE_SECONDS: Final = 0.25
_NO_STATES: Final[Mapping[int, ResumeState]] = MappingProxyType({})
_WEIGHT: Final = {Priority.INTERACTIVE: 4.0, Priority.BATCH: 1.0}

_log = structlog.get_logger("darkroom.worker")


def run(_spec: Mapping[str, Any]) -> NoReturn:
    """The function that jobs name in RQ, so that its tools can show them. It never runs."""
    raise RuntimeError(
        "a Darkroom job runs under `darkroom worker`, which denoises many jobs in one batch; this looks like a stock "
        "RQ worker on Darkroom's queues: stop it"
    )


@dataclass(frozen=True)
class ServedModel:
    card: ModelCard
    model: LatentDiffusion


class BatchWorker:
    """Runs in the thread that calls `work`, which owns all computing. `stop` may come from a signal handler."""

    def __init__(
        self,
        settings: Settings,
        served: Mapping[str, ServedModel],
        engine: Engine,
        store: Store,
        metrics: WorkerMetrics,
        name: str | None = None,
    ) -> None:
        cards = [one.card for one in served.values()]
        self.broker = WorkerBroker(settings, cards, slots=engine.free_slots, name=name, fingerprint=engine.fingerprint)
        self._settings = settings
        self._served = served
        self._engine = engine
        self._metrics = metrics
        metrics.watch(engine, [(one.card, one.model) for one in served.values()], store)
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._link = BrokerLink(self.broker, store, settings, self._inbox)
        self._jobs: dict[str, RunningJob] = {}
        self._rows: dict[str, tuple[RunningJob, int]] = {}
        self._asked = False
        self._saved = time.monotonic()
        self._stopping_since: float | None = None
        self._hurry = False

    def stop(self) -> None:
        """Take no more, hand back what has not begun, finish the rest within `drain_seconds`, then hand back that too;
        called again: hand back at once."""
        self._hurry = self._stopping_since is not None
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
        self._inbox.put(Wake())

    def work(self) -> None:
        """Until stopped. Raises what a thread could not make sense of; the jobs held then come back by their leases."""
        self._link.start(self._is_stopping)
        _log.info("worker ready", worker=self.broker.name, models=sorted(self._served))
        try:
            while self._stopping_since is None or self._jobs or self._asked:
                self._metrics.pulse.beat()
                self._read_inbox()
                self._stop_or_ask()
                self._on_events(self._engine.tick())
                self._save_now_and_then()
        finally:
            self._link.close()
        _log.info("worker stopped", worker=self.broker.name)

    def _is_stopping(self) -> bool:
        """Asked again and again while Redis is away, which is no reason to be taken for stuck."""
        self._metrics.pulse.beat()
        return self._stopping_since is not None

    def _read_inbox(self) -> None:
        """All that has come; waits for something only when there is nothing to compute."""
        try:
            message = self._inbox.get(timeout=_IDLE_SECONDS) if self._engine.idle else self._inbox.get_nowait()
            while True:
                self._on_message(message)
                message = self._inbox.get_nowait()
        except Empty:
            return

    def _stop_or_ask(self) -> None:
        if self._stopping_since is None:
            free = min(self._engine.free_slots, self._link.room_left)
            if free > 0 and not self._asked:
                self._asked = True
                self._link.want(free)
            return
        self._link.stop_taking()
        overdue = self._hurry or time.monotonic() - self._stopping_since > self._settings.drain_seconds
        # Each goes to the head of its queue: the oldest last.
        for job in [job for job in reversed(self._jobs.values()) if overdue or not job.begun]:
            self._hand_back(job)

    def _save_now_and_then(self) -> None:
        """Resume states of all jobs that have begun, so that another worker can go on should this one die."""
        now = time.monotonic()
        if now - self._saved < self._settings.resume_seconds:
            return
        self._saved = now
        for job in self._jobs.values():
            if job.begun:
                self._link.save_resume(job.taken, self._states(job), job.steps_done)

    def _states(self, job: RunningJob) -> dict[int, ResumeState]:
        """Of the job's pictures, by index, those that have begun."""
        states = {index: self._engine.snapshot(row_id) for index, row_id in enumerate(job.row_ids)}
        return {index: state for index, state in states.items() if state is not None}

    def _hand_back(self, job: RunningJob, more: Mapping[int, ResumeState] = _NO_STATES) -> None:
        """`more` are states of rows that have left the engine."""
        states = {**self._states(job), **more}
        self._forget(job)
        self._link.hand_back(job.taken, states, job.steps_done)

    def _on_message(self, message: Message) -> None:
        match message:
            case Arrived():
                self._begin(message)
            case TakeEnded():
                self._asked = False
            case Stopped(stops):
                for execution_id, stop in stops.items():
                    if (job := self._jobs.get(execution_id)) is not None:
                        self._forget(job)
                        self._link.end_stopped(job.taken, stop)
            case Lost(executions):
                for execution_id in executions & self._jobs.keys():
                    self._forget(self._jobs[execution_id])
            case Stored(execution_id, picture, span):
                job = self._jobs.get(execution_id)
                if job is not None and job.add_stored(picture, span):
                    self._succeed(job)
            case StoreFailed(execution_id, error):
                if (job := self._jobs.get(execution_id)) is not None:
                    self._fail(job, store_error(error))
            case Broken(error):
                raise RuntimeError("a thread of the worker failed") from error
            case Wake():
                pass

    def _begin(self, arrived: Arrived) -> None:
        spec = arrived.job.spec
        job = self._jobs[arrived.job.execution_id] = RunningJob(arrived.job)
        try:
            served = self._served[spec.model]
            requests = picture_requests(spec, served.card, arrived.inputs)
            job.warnings = job_warnings(spec, served.card, served.model.conditioner)
            for index, (row_id, request) in enumerate(zip(job.row_ids, requests, strict=True)):
                resume = resume_state(arrived.job.resume.get(index))
                if resume is not None:
                    job.resumed(index, resume.step)
                self._engine.submit(row_id, spec.model, request, _WEIGHT[spec.priority], resume)
                self._rows[row_id] = (job, index)
        except Exception as error:  # noqa: BLE001  # a job must not end the worker
            self._fail(job, begin_error(error))
            return
        _log.info(
            "job begun",
            job=spec.id,
            request_id=spec.request_id,
            task=spec.task.value,
            model=spec.model,
            n=spec.n,
            steps=spec.steps,
        )
        if job.warnings:
            self._link.warn(job.taken, job.warnings)

    def _on_events(self, events: Sequence[Event]) -> None:
        returned: dict[str, ResumeState | None] = {}
        for event in events:
            if isinstance(event, LaneTicked):
                self._metrics.ticked(event)
            elif isinstance(event, RowHandedBack):
                returned[event.row_id] = event.resume
            elif event.row_id in self._rows:  # else another row of its job has just ended the job
                self._on_row(event)
        self._on_handed_back(returned)

    def _on_row(self, event: RowProgress | RowFinished | RowFailed) -> None:
        match event:
            case RowProgress():
                self._on_progress(event)
            case RowFinished():
                job, index = self._rows.pop(event.row_id)
                job.add_finished(event.denoise, event.decode)
                self._link.upload(job.taken, index, event.image, self._served[job.taken.spec.model].card.digest)
            case RowFailed():
                job, _ = self._rows.pop(event.row_id)
                error = row_error(event)
                unexpected = event.error if error.code is ErrorCode.INTERNAL else None
                _log.warning(
                    "row failed", job=job.taken.job_id, stage=event.stage, code=error.code, exc_info=unexpected
                )
                self._fail(job, error)

    def _on_handed_back(self, returned: Mapping[str, ResumeState | None]) -> None:
        """A row for which there is no memory takes its whole job back to the queue."""
        jobs: dict[RunningJob, dict[int, ResumeState]] = {}
        for row_id, state in returned.items():
            if row_id in self._rows:
                job, index = self._rows[row_id]
                jobs.setdefault(job, {}).update({} if state is None else {index: state})
        for job, states in reversed(jobs.items()):  # each goes to the head of its queue: the oldest last
            _log.warning("job handed back: memory ran out", job=job.taken.job_id)
            self._hand_back(job, states)

    def _on_progress(self, event: RowProgress) -> None:
        """At most one progress event and one preview per job in 100 ms, but the last step always."""
        job, index = self._rows[event.row_id]
        slowest, now = job.advance(index, event.step), time.monotonic()
        if slowest == event.steps or now - job.reported >= _NEWS_SECONDS:
            job.reported = now
            self._link.progress(job.taken, slowest, event.steps, job.steps_done)
        if event.preview is not None and now - job.previewed >= _NEWS_SECONDS:
            job.previewed = now
            self._link.preview(job.taken, index, event.step, event.preview)

    def _succeed(self, job: RunningJob) -> None:
        self._forget(job)
        result = job.result(self._engine.fingerprint)
        self._metrics.succeeded(job.taken.spec, result.timings)
        self._link.succeed(job.taken, result)

    def _fail(self, job: RunningJob, error: JobError) -> None:
        self._forget(job)
        self._link.fail(job.taken, error)

    def _forget(self, job: RunningJob) -> None:
        """The job's rows leave the engine; uploads on their way end unheard."""
        del self._jobs[job.taken.execution_id]
        for row_id in job.row_ids:
            self._engine.cancel(row_id)
            self._rows.pop(row_id, None)


def resume_state(data: bytes | None) -> ResumeState | None:
    """None, so that the picture begins anew, also for what some other version wrote."""
    try:
        return None if data is None else ResumeState.from_bytes(data)
    except ValueError as error:
        _log.warning("resume state left", error=str(error))
        return None
