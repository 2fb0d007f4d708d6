"""Cancel: a waiting job ends at once; a running one is flagged, and its worker ends it at the next step."""

from redis import Redis
from redis.client import Pipeline

from broker.finish import Finisher, Holding, transact
from broker.stops import Stop
from contract import keys
from contract.events import CancelledEvent
from contract.spec import JobStatus


def cancel(connection: Redis, finisher: Finisher, job_id: str) -> JobStatus | None:
    """The status afterwards: cancelled, running (it ends at its next step), or how it had ended; None: no such job."""

    def flag(holding: Holding, pipeline: Pipeline) -> JobStatus | None:
        pipeline.multi()
        if holding.status is JobStatus.RUNNING:
            pipeline.hset(keys.job(job_id), "stop", Stop.CANCELLED)
        return holding.status

    while True:
        if finisher.end(job_id, None, CancelledEvent()):
            return JobStatus.CANCELLED
        status = transact(connection, job_id, flag)
        if status is not JobStatus.QUEUED:  # queued again between the two: begin again
            return status
