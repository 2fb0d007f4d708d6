"""Cancel: a waiting job ends at once; a running one is flagged, and its worker ends it at the next step."""

from redis import Redis

from broker.finish import Finisher
from broker.state import read_state
from broker.stops import Stop
from contract.events import CancelledEvent
from contract.spec import JobStatus


def cancel(connection: Redis, finisher: Finisher, job_id: str) -> JobStatus | None:
    """The status afterwards: cancelled, running (it ends at its next step), or how it had ended; None: no such job."""
    while True:
        state = read_state(connection, job_id)
        if state is None or state.status is None:
            return None
        if state.status is JobStatus.QUEUED and finisher.end(state.ref, None, CancelledEvent()):
            return JobStatus.CANCELLED
        if state.status is JobStatus.RUNNING and finisher.flag(job_id, Stop.CANCELLED):
            return JobStatus.RUNNING
        if state.status.ended:
            return state.status
        # It was taken, or came back, between the two: look again.
