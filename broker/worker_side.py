"""The worker's view of the broker: synchronous, thread-safe, one object per worker process.

    broker = WorkerBroker(settings, cards, slots=8)
    broker.register()
    for job in broker.take(free_slots): ...          # at a step boundary
    lost = broker.heartbeat(held)                     # from a thread, every settings.heartbeat_seconds
    stops = broker.stops(held)                        # before a step, a few times a second
    broker.progress(job, step, steps); broker.preview(job, 0, step, jpeg, "image/jpeg")
    broker.save_resume(job, {0: state}, steps)        # every few seconds
    broker.succeed(job, result) / broker.fail(job, error) / broker.end_stopped(job, stop)
    broker.hand_back(job, {0: state}, steps)
    broker.close()

Every method may raise `connection.REDIS_UNAVAILABLE`; the four endings return False when the job had been given to
another worker: then the caller forgets it.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final
from uuid import uuid4

from broker import catalogue
from broker.connection import REDIS_UNAVAILABLE, connect, text
from broker.events import Progress, Publisher
from broker.fence import Fence
from broker.finish import Finisher, Outcome, stopped
from broker.janitor import Cleaned, Janitor
from broker.reap import Sweeper, Swept
from broker.refusals import LUA_EVEN_IF_FULL, WritesRefusedError
from broker.resume import ResumeStore, SavedWork
from broker.rq_surface import WorkerRegistration
from broker.state import JobRef, read_state
from broker.stops import Stop
from broker.store import Store
from broker.take import TakenJob, Taker
from contract import keys
from contract.card import ModelCard
from contract.errors import ErrorCode
from contract.events import FailedEvent, PreviewEvent, ProgressEvent, SucceededEvent
from contract.settings import Settings
from contract.spec import JobError, JobResult, JobStatus, JobWarning, Priority

# KEYS: leases; ARGV: seconds, members. Only leases that are still held are renewed; returns the lost ones.
_RENEW: Final = (
    LUA_EVEN_IF_FULL
    + """
local clock = redis.call('TIME')
local lease = string.format('%.6f', clock[1] + clock[2] / 1000000 + tonumber(ARGV[1]))
local lost = {}
for i = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    redis.call('ZADD', KEYS[1], 'XX', lease, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""
)
_PROGRESS_SECONDS: Final = 0.1
_RQ_TTL_SECONDS: Final = 60
_NO_STATES: Final[Mapping[int, bytes]] = MappingProxyType({})


def worker_name() -> str:
    """A new one for every start: RQ refuses to reuse the name of a worker that was killed."""
    return f"{socket.gethostname().replace('.', '-')}-{os.getpid()}-{uuid4().hex[:8]}"


class WorkerBroker:
    """Takes jobs of the given models and reports on them. `slots` (pictures at once) and `fingerprint` (what the
    pictures' bits depend on) only inform the catalogue."""

    def __init__(
        self,
        settings: Settings,
        cards: Sequence[ModelCard],
        slots: int,
        name: str | None = None,
        fingerprint: str = "",
    ) -> None:
        self.name = name or worker_name()
        self._settings = settings
        self._cards = tuple(cards)
        self._slots = slots
        self._fingerprint = fingerprint
        self._redis = connect(settings.redis_url)
        queues = [[keys.queue_name(card.name, priority) for card in cards] for priority in Priority]
        self._rq_redis = connect(settings.redis_url)
        self._queues = [queue for models in queues for queue in models]
        self._registration: WorkerRegistration | None = None
        self._taker = Taker(self._redis, self.name, queues, settings.lease_seconds)
        self._finisher = Finisher(self._redis, settings)
        self._publisher = Publisher(self._redis)
        self._resume = ResumeStore(self._redis, settings)
        self._sweeper = Sweeper(self._redis, settings)
        self._renew = self._redis.register_script(_RENEW)
        self._fence = Fence(self._redis)
        self._held: dict[str, TakenJob] = {}
        self._reported: dict[str, float] = {}
        self._steps: dict[str, int] = {}

    def register(self) -> None:
        """Publishes the model cards and shows the worker to gateways and `rq info`. Call when ready to work."""
        self._registration = WorkerRegistration(self.name, self._queues, self._rq_redis, _RQ_TTL_SECONDS)
        self._beat(0)

    def close(self) -> None:
        """Takes the worker off the lists. Held jobs are not touched: end them or hand them back first."""
        if self._registration is not None:
            with contextlib.suppress(WritesRefusedError):  # only RQ's tools look at it
                self._registration.death()
            catalogue.remove_worker(self._redis, self.name)
        self._rq_redis.close()
        self._redis.close()

    def take(self, slots: int) -> list[TakenJob]:
        """Up to `slots` jobs, interactive before batch; empty when none waits. Never blocks.

        One job may hold several pictures (`spec.n`). A job whose spec is unreadable fails here. Nothing comes while
        this worker holds a job that must run alone, or is to hold one as soon as it has ended all others.
        """
        held = list(self._held.values())
        if slots <= 0 or any(job.alone for job in held):
            return []
        jobs = []
        for taken in self._taker.take(slots, empty=not held):
            if isinstance(taken, TakenJob):
                jobs.append(taken)
                self._hold(taken)
            else:
                detail = f"this worker cannot read the job: {taken.reason}"
                error = JobError(code=ErrorCode.SPEC_UNSUPPORTED, detail=detail)
                with contextlib.suppress(*REDIS_UNAVAILABLE):  # the others have been taken; its lease brings it back
                    state = read_state(self._redis, taken.job_id)
                    if state is not None:
                        self._finisher.end(state.ref, taken.execution_id, FailedEvent(error=error))
        return jobs

    def heartbeat(self, held: Iterable[TakenJob]) -> set[str]:
        """Renews the leases of `held` and the worker's own entry; returns the ids of jobs that have been lost.

        Drop a lost job at the next step: another worker has it or will. Call every `heartbeat_seconds`, also when idle.
        """
        members = {f"{job.job_id}:{job.execution_id}": job.job_id for job in held}
        lost = self._renew(keys=[keys.leases()], args=[self._settings.lease_seconds, *members]) if members else []
        self._beat(len(members))
        for member in lost:
            self._forget(text(member).partition(":")[2])
        return {members[text(member)] for member in lost}

    def stops(self, held: Iterable[TakenJob]) -> dict[str, Stop]:
        """Which of `held` should be ended at the next step, by job id, and why; see `end_stopped`."""
        jobs = list(held)
        if not jobs:
            return {}
        pipeline = self._redis.pipeline(transaction=False)
        for job in jobs:
            pipeline.hget(keys.job(job.job_id), "stop")
        answers = pipeline.execute()
        return {job.job_id: Stop(text(stop)) for job, stop in zip(jobs, answers, strict=True) if stop}

    def progress(self, job: TakenJob, step: int, steps: int, total: int | None = None) -> None:
        """Publishes that `step` of `steps` are done; at most every 100 ms per job, the last step always.

        `total` counts the steps that all pictures of the job have done, as `save_resume` counts them; left out: those
        of a job whose pictures are all at `step`.
        """
        self._steps[job.execution_id] = steps
        now = time.monotonic()
        if step < steps and now - self._reported.get(job.execution_id, 0.0) < _PROGRESS_SECONDS:
            return
        self._reported[job.execution_id] = now
        event = ProgressEvent(step=step, steps=steps)
        progress = Progress(step, steps, step * job.spec.n if total is None else total)
        self._publisher.publish(job.job_id, job.execution_id, event, progress=str(progress))

    def preview(self, job: TakenJob, index: int, step: int, data: bytes, content_type: str) -> None:
        """Replaces the job's latest preview (a small encoded picture) and says so in the stream."""
        event = PreviewEvent(index=index, step=step, content_type=content_type)
        self._publisher.publish(job.job_id, job.execution_id, event, preview=data)

    def warn(self, job: TakenJob, warnings: Sequence[JobWarning]) -> None:
        """Makes warnings visible while the job runs; put them into its result as well."""
        document = json.dumps([warning.model_dump() for warning in warnings])
        command = ("HSET", keys.job(job.job_id), "warnings", document)
        self._fence.run(job.job_id, JobStatus.RUNNING, job.execution_id, [command])

    def succeed(self, job: TakenJob, result: JobResult) -> bool:
        """Ends the job with its pictures, which are in the store already. False: fenced off, nothing was written."""
        return self._end(job, SucceededEvent(result=result))

    def fail(self, job: TakenJob, error: JobError) -> bool:
        """Ends the job for good. False: fenced off."""
        return self._end(job, FailedEvent(error=error))

    def end_stopped(self, job: TakenJob, stop: Stop) -> bool:
        """Ends a job that `stops` named: as cancelled, or as failed with deadline_exceeded. False: fenced off."""
        return self._end(job, stopped(stop, job.spec.deadline_seconds))

    def save_resume(self, job: TakenJob, states: Mapping[int, bytes], steps: int = 0) -> bool:
        """Keeps what the pictures in `states` (by index) need to go on elsewhere. False: the job has been lost.

        `steps` counts the denoising steps, summed over all pictures of the job, that need not be done again thanks to
        these states and those saved before: 3 pictures at steps 5, 4 and 0 give 9. A job that grew in it between two
        deaths of its workers has made progress, which an innocent job is known by. A job whose states exceed
        `max_resume_bytes` is not saved.
        """
        return self._resume.save(job.spec, job.execution_id, SavedWork(states, steps))

    def hand_back(self, job: TakenJob, states: Mapping[int, bytes] = _NO_STATES, steps: int = 0) -> bool:
        """Puts an unfinished job back at the head of its queue, e.g. on SIGTERM, with `states` and `steps` as in
        `save_resume`; a job that is to be stopped ends instead. False: fenced off."""
        work = SavedWork(states, steps)
        answer = self._finisher.hand_back(JobRef.of(job.spec), job.execution_id, work, job.alone)
        if answer.stop is not None:
            return self.end_stopped(job, Stop(answer.stop))
        self._forget(job.execution_id)
        return answer.done

    def sweep(self) -> Swept:
        """Puts other workers' abandoned jobs back and fails expired ones. Call every `reap_seconds`."""
        return self._sweeper.sweep()

    def clean(self, store: Store) -> Cleaned:
        """Retention, as gateways keep it too. Call every `janitor_seconds`, from a thread that may take its time.

        Raises `store.StoreError` as well.
        """
        return Janitor(self._redis, store, self._settings).clean()

    def _end(self, job: TakenJob, outcome: Outcome) -> bool:
        registered = self.name if self._registration is not None else ""
        steps = self._steps.get(job.execution_id, job.spec.steps) * job.spec.n
        ended = self._finisher.end(JobRef.of(job.spec), job.execution_id, outcome, registered, steps)
        self._forget(job.execution_id)
        if not ended:
            with contextlib.suppress(WritesRefusedError):  # or a full Redis would have us end the job again and again
                self._finisher.count_fenced(job.spec.model)
        return ended

    def _hold(self, job: TakenJob) -> None:
        for other in [held for held in list(self._held.values()) if held.job_id == job.job_id]:
            self._forget(other.execution_id)  # its lease had ended
        self._held[job.execution_id] = job

    def _forget(self, execution_id: str) -> None:
        self._held.pop(execution_id, None)
        self._reported.pop(execution_id, None)
        self._steps.pop(execution_id, None)

    def _beat(self, running: int) -> None:
        worker = catalogue.LiveWorker(
            name=self.name,
            models=tuple(card.name for card in self._cards),
            slots=self._slots,
            running=running,
            fingerprint=self._fingerprint,
        )
        catalogue.beat(self._redis, worker, self._settings.lease_seconds)
        if self._registration is None:
            return
        with contextlib.suppress(WritesRefusedError):  # a full Redis hears of it later; the lease counts
            if not self._registration.known:
                catalogue.publish_cards(self._redis, self._cards)
                self._registration.birth()
            self._registration.beat(busy=running > 0)
