"""How a job leaves an execution: ended for good, or back to the queue. Fenced: whoever lost the job changes nothing.

One transaction writes RQ's state, our own, the terminal event and the counters, so what is counted is what is stored.
A worker that did not get the answer may repeat its call: it is done once, and answered as the first time.
"""

from collections.abc import Sequence
from typing import Final, Literal

from redis import Redis
from redis.typing import EncodableT

from broker import lines, rq_surface
from broker.events import added_event
from broker.fence import ANY, Answer, At, Command, Fence
from broker.resume import ResumeStore, SavedWork
from broker.state import JobRef, read_state
from broker.stops import Stop
from contract import keys, metrics
from contract.errors import ErrorCode
from contract.events import CancelledEvent, FailedEvent, QueuedEvent, SucceededEvent
from contract.settings import Settings
from contract.spec import JobError, JobStatus

Outcome = SucceededEvent | FailedEvent | CancelledEvent
Abandoned = Literal["returned", "ended", "gone"]

# Redis forgets by itself what no janitor came to delete.
_BACKSTOP_SECONDS: Final = 3600
_STATUS: Final = {
    "succeeded": JobStatus.SUCCEEDED,
    "failed": JobStatus.FAILED,
    "cancelled": JobStatus.CANCELLED,
}


def stopped(stop: Stop, deadline_seconds: float | None) -> Outcome:
    """How a running job ends that was asked to stop."""
    if stop is Stop.CANCELLED:
        return CancelledEvent()
    detail = f"the job did not finish within its deadline of {deadline_seconds or 0:g} s"
    return FailedEvent(error=JobError(code=ErrorCode.DEADLINE_EXCEEDED, detail=detail))


class Finisher:
    """Ends executions and waiting jobs. Thread-safe; used by workers, by cancel and by the sweep alike."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._fence = Fence(connection)
        self._resume = ResumeStore(connection, settings)

    def end(self, job: JobRef, execution_id: str | None, outcome: Outcome, worker: str = "", steps: int = 0) -> bool:
        """Ends the job if `execution_id` still holds it (None: if it still waits); else False.

        `worker` is credited with the job in RQ; `steps` are the denoising steps of a succeeded job.
        """
        commands = [*self._ended_in_rq(job, outcome, worker), *self._ended_in_ours(job, outcome)]
        if execution_id is None:
            commands += lines.gave_up(job.queue, job.job_id, job.owner)
            return self._fence.run(job.job_id, JobStatus.QUEUED, None, commands).done
        mark = f"{outcome.type}:{execution_id}"
        commands += [*self._released(job, execution_id, mark), *_counted(job, outcome, steps)]
        return self._fence.run(job.job_id, JobStatus.RUNNING, execution_id, commands, mark).done

    def hand_back(self, job: JobRef, execution_id: str, work: SavedWork, suspect: bool) -> Answer:
        """Puts the job back at the head of its queue, unless it is to be ended."""
        saving = self._resume.commands(job.spec, work) if job.spec else []
        event = QueuedEvent(reason="handed_back")
        return self._requeue(job, execution_id, event, suspect, saving)

    def abandon(self, job_id: str, execution_id: str) -> Abandoned:
        """After the death of a worker: back to the queue, or to an end where the job must not or need not run again."""
        state = read_state(self._connection, job_id)
        if state is None or state.execution_id != execution_id:
            return "gone"
        job = state.ref
        deaths = state.deaths.another(state.saved_steps)
        end: Outcome | None = None
        if state.stop is not None:
            end = stopped(state.stop, job.spec.deadline_seconds if job.spec else None)
        elif (reason := deaths.verdict(self._settings.max_abandonments)) is not None:
            end = FailedEvent(error=JobError(code=ErrorCode.WORKER_LOST, detail=f"{reason}; it is not tried again"))
        if end is not None:
            return "ended" if self.end(job, execution_id, end) else "gone"
        more: list[Command] = [
            ("HSET", keys.job(job_id), *(part for pair in deaths.fields().items() for part in pair)),
            _count(metrics.EXECUTIONS_REAPED, job.model),
        ]
        if state.lost_steps:
            more.append(_count(metrics.DENOISING_STEPS_REDONE, job.model, by=state.lost_steps))
        answer = self._requeue(job, execution_id, QueuedEvent(reason="abandoned"), deaths.suspect, more)
        if answer.stop is not None:  # asked just now
            return self.abandon(job_id, execution_id)
        return "returned" if answer.done else "gone"

    def flag(self, job_id: str, stop: Stop) -> bool:
        """Asks whoever runs the job to end it. False: it does not run."""
        command: Command = ("HSET", keys.job(job_id), "stop", stop)
        return self._fence.run(job_id, JobStatus.RUNNING, ANY, [command]).done

    def count_fenced(self, model: str) -> None:
        """A result came too late and was thrown away."""
        self._connection.hincrby(keys.counters(), keys.counter(metrics.RESULTS_FENCED.name, model), 1)

    def _requeue(
        self, job: JobRef, execution_id: str, event: QueuedEvent, suspect: bool, more: Sequence[Command]
    ) -> Answer:
        mark = f"{event.reason}:{execution_id}"
        commands = [
            *self._released(job, execution_id, mark),
            *rq_surface.waits_again(job.job_id),
            *lines.came_back(job.queue, job.job_id, suspect),
            ("HDEL", keys.job(job.job_id), "started_at"),
            added_event(job.job_id, event),
            *more,
        ]
        if job.spec is None or job.spec.deadline_seconds is None:
            due = At(self._settings.queue_deadline_seconds)
            commands.append(("ZADD", keys.deadlines(), due, job.job_id))
        return self._fence.run(job.job_id, JobStatus.RUNNING, execution_id, commands, mark, unless_stopped=True)

    def _released(self, job: JobRef, execution_id: str, mark: str) -> list[Command]:
        job_id = job.job_id
        return [
            *rq_surface.execution_dropped(job_id, execution_id, job.queue),
            ("HSET", keys.job(job_id), "left", mark),
            ("HDEL", keys.job(job_id), "execution"),
            ("ZREM", keys.leases(), f"{job_id}:{execution_id}"),
            ("DEL", keys.progress(job_id), keys.preview(job_id)),
        ]

    def _ended_in_rq(self, job: JobRef, outcome: Outcome, worker: str) -> list[Command]:
        keep = self._settings.retention_seconds + _BACKSTOP_SECONDS
        match outcome:
            case SucceededEvent(result=result):
                store_keys = [picture.key for picture in result.pictures]
                commands = rq_surface.end_succeeded(job.job_id, job.queue, worker, store_keys, keep)
            case FailedEvent(error=error):
                detail = f"{error.code}: {error.detail}"
                commands = rq_surface.end_failed(job.job_id, job.queue, worker, detail, keep)
            case CancelledEvent():
                return [*rq_surface.end_cancelled(job.job_id, job.queue, keep)]
        credit = [rq_surface.worker_counted(worker, isinstance(outcome, SucceededEvent))] if worker else []
        return [*commands, *credit]

    def _ended_in_ours(self, job: JobRef, outcome: Outcome) -> list[Command]:
        settings, job_id, spec = self._settings, job.job_id, job.spec
        fields: list[EncodableT | At] = ["finished_at", At()]
        if isinstance(outcome, SucceededEvent):
            fields += ["result", outcome.result.to_json()]
        if isinstance(outcome, FailedEvent):
            fields += ["error", outcome.error.model_dump_json()]
        commands: list[Command] = [
            ("HSET", keys.job(job_id), *fields),
            ("HDEL", keys.job(job_id), "stop"),
            ("EXPIRE", keys.job(job_id), settings.retention_seconds + _BACKSTOP_SECONDS),
            ("DEL", keys.resume(job_id)),
            ("ZREM", keys.deadlines(), job_id),
            ("ZADD", keys.ended(), At(), job_id),
            added_event(job_id, outcome),
            ("EXPIRE", keys.events(job_id), settings.events_retention_seconds),
            ("SREM", keys.waiting(job.owner, job.model), job_id),
            _count(metrics.STEPS_ENDED, job.model, by=job.steps),
        ]
        if isinstance(outcome, FailedEvent):
            commands.append(_count(metrics.JOBS_FAILED, job.model, outcome.error.code))
        if spec is not None:
            commands.append(_count(metrics.JOBS_ENDED, spec.model, spec.task, _STATUS[outcome.type]))
            if spec.inputs:
                commands.append(("ZADD", keys.inputs_due(), At(settings.inputs_retention_seconds), job_id))
        return commands


def _counted(job: JobRef, outcome: Outcome, steps: int) -> list[Command]:
    """What a succeeded job has made."""
    if job.spec is None or not isinstance(outcome, SucceededEvent):
        return []
    made = _count(metrics.PICTURES, job.spec.model, job.spec.task, by=len(outcome.result.pictures))
    return [made, _count(metrics.DENOISING_STEPS, job.spec.model, by=steps)]


def _count(metric: metrics.Metric, *labels: str, by: int = 1) -> Command:
    return ("HINCRBY", keys.counters(), keys.counter(metric.name, *labels), by)
