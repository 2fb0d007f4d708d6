"""The jobs that a worker holds, known to all of its threads."""

import threading
from collections.abc import Iterable

from broker.take import TakenJob


class HeldJobs:
    """Each from the take until its end has been written, or until another worker has the job. Thread-safe."""

    def __init__(self) -> None:
        self._jobs: dict[str, TakenJob] = {}
        self._lock = threading.Lock()

    def add(self, job: TakenJob) -> frozenset[str]:
        """Returns earlier executions of the same job, which are thereby lost: it came to this worker once more."""
        with self._lock:
            again = {execution for execution, held in self._jobs.items() if held.job_id == job.job_id}
            for execution_id in again:
                del self._jobs[execution_id]
            self._jobs[job.execution_id] = job
        return frozenset(again)

    def release(self, executions: Iterable[str]) -> None:
        with self._lock:
            for execution_id in executions:
                self._jobs.pop(execution_id, None)

    def __contains__(self, job: TakenJob) -> bool:
        return job.execution_id in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def by_id(self) -> dict[str, TakenJob]:
        with self._lock:
            return {job.job_id: job for job in self._jobs.values()}
