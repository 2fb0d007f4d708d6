"""A job in the worker: its pictures on their way through the engine and into the store."""

from collections.abc import Iterable

from broker.take import TakenJob
from contract.spec import JobResult, JobWarning, PictureResult, Timings
from worker.engine.events import Span


class RunningJob:
    """Seen by the main loop only. `begun` once one of its pictures has taken a step."""

    def __init__(self, taken: TakenJob) -> None:
        self.taken = taken
        self.warnings: tuple[JobWarning, ...] = ()
        self.begun = False
        self.previewed = 0.0
        self.reported = 0.0
        self._steps = [0] * taken.spec.n
        self._denoise: list[Span] = []
        self._decode: list[Span] = []
        self._store: list[Span] = []
        self._pictures: dict[int, PictureResult] = {}

    @property
    def row_ids(self) -> list[str]:
        return [self.row_id(index) for index in range(self.taken.spec.n)]

    def row_id(self, index: int) -> str:
        """By execution: a job that was lost and taken again is another one to the engine."""
        return f"{self.taken.execution_id}/{index}"

    def advance(self, index: int, step: int) -> int:
        """Picture `index` has done `step` steps; returns the slowest picture's count."""
        self.begun = True
        self._steps[index] = step
        return min(self._steps)

    def resumed(self, index: int, step: int) -> None:
        """Picture `index` goes on where another execution was."""
        self._steps[index] = step

    @property
    def steps_done(self) -> int:
        """Summed over all pictures."""
        return sum(self._steps)

    def add_finished(self, denoise: Span, decode: Span) -> None:
        self._denoise.append(denoise)
        self._decode.append(decode)

    def add_stored(self, picture: PictureResult, store: Span) -> bool:
        """True with the last picture."""
        self._pictures[picture.index] = picture
        self._store.append(store)
        return len(self._pictures) == self.taken.spec.n

    def result(self, fingerprint: str) -> JobResult:
        """`fingerprint` is the engine's."""
        timings = Timings(
            queued=self.taken.queued_seconds,
            denoise=_from_first_to_last(self._denoise),
            decode=_from_first_to_last(self._decode),
            store=_from_first_to_last(self._store),
        )
        pictures = tuple(self._pictures[index] for index in sorted(self._pictures))
        return JobResult(pictures=pictures, timings=timings, warnings=self.warnings, fingerprint=fingerprint)


def _from_first_to_last(spans: Iterable[Span]) -> float:
    spans = list(spans)
    return max(span.end for span in spans) - min(span.begin for span in spans)
