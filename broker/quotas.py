"""How much one API key may ask for: the settings' limits, or the key's own, and what is left of them."""

from dataclasses import dataclass
from typing import Self

from pydantic import Field

from contract.settings import Settings
from contract.spec import Document


class OwnLimits(Document):
    """What one API key has in place of the settings' limits; None: as the settings say."""

    rate_per_second: float | None = Field(default=None, ge=0.001, le=1e6)
    rate_burst: int | None = Field(default=None, ge=1, le=10**6)
    max_running: int | None = Field(default=None, ge=1, le=10**6)
    max_waiting: int | None = Field(default=None, ge=1, le=10**6)


@dataclass(frozen=True, slots=True)
class Limits:
    """`rate_per_second` submits in the long run, `rate_burst` at once; `max_running` jobs in workers (None: any
    number), `max_waiting` unfinished jobs for one model."""

    rate_per_second: float
    rate_burst: int
    max_running: int | None
    max_waiting: int

    @classmethod
    def of(cls, settings: Settings, own: OwnLimits | None = None) -> Self:
        own = own or OwnLimits()
        return cls(
            own.rate_per_second or settings.rate_per_second,
            own.rate_burst or settings.rate_burst,
            own.max_running or settings.max_running_per_key,
            own.max_waiting or settings.max_waiting_per_key,
        )


@dataclass(frozen=True, slots=True)
class Quota:
    """A key's limits as they stood after one submit: whole submits left in the bucket (`tokens`, with the fraction that
    has grown of the next) and the key's unfinished jobs for the model."""

    limits: Limits
    tokens: float
    unfinished: int
