"""What the deaths of workers tell of a job that was there: nothing yet, that it must run alone, or that it fails."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

_SUSPECT_AT: Final = 2
_ALONE_AT_MOST: Final = 2


@dataclass(frozen=True, slots=True)
class Deaths:
    """The record of one job.

    A job that was present at two deaths is a suspect: it runs alone, so that no neighbour dies with it again. A death
    counts against the job where it saved no step more than before the previous one: so an innocent job, however often
    its workers are killed, gets on; and since steps are finite, a job cannot make progress for ever.
    """

    total: int = 0
    fruitless: int = 0
    alone_in_a_row: int = 0
    steps: int = 0

    @property
    def suspect(self) -> bool:
        return self.total >= _SUSPECT_AT

    def another(self, steps: int) -> Self:
        """One more death; `steps` denoising steps of the job had been saved by then."""
        progress = steps > self.steps
        return type(self)(
            total=self.total + 1,
            fruitless=self.fruitless + (not progress),
            alone_in_a_row=0 if progress or not self.suspect else self.alone_in_a_row + 1,
            steps=max(steps, self.steps),
        )

    def verdict(self, most_fruitless: int) -> str | None:
        """Why the job fails; None: it is tried again."""
        if self.alone_in_a_row >= _ALONE_AT_MOST:
            return f"{self.alone_in_a_row} workers in a row died while running this job alone, without progress"
        if self.fruitless > most_fruitless:
            return f"{self.fruitless} workers died while running this job, without progress"
        return None

    def fields(self) -> dict[str, int]:
        """As the job's hash keeps them."""
        return {
            "deaths": self.total,
            "deaths_fruitless": self.fruitless,
            "deaths_alone": self.alone_in_a_row,
            "deaths_steps": self.steps,
            "suspect": int(self.suspect),
        }

    @classmethod
    def parse(cls, fields: Mapping[bytes, bytes]) -> Self:
        names = (b"deaths", b"deaths_fruitless", b"deaths_alone", b"deaths_steps")
        return cls(*(int(fields.get(name, 0)) for name in names))
