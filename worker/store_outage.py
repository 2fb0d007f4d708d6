"""What a worker does while the store is away: at its start, how long it tries again, and what it tells in the end."""

from collections.abc import Iterator
from typing import Final

import structlog

from broker.store import Store, StoreError, StoreFullError
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobError

_FIRST: Final = 0.2
_LONGEST: Final = 10.0

_log = structlog.get_logger("darkroom.worker")


def open_store(settings: Settings) -> Store:
    """Begins without a store that is away; raises `StoreRefusedError` where it answers and refuses."""
    store = Store.of(settings)
    if (error := store.check()) is not None:
        _log.warning("store away", error=str(error))
    return store


def pauses(patience: float) -> Iterator[float]:
    """Seconds between one try and the next: doubling from 0.2 to 10, `patience` in all."""
    pause, left = _FIRST, patience
    while left > 0:
        yield min(pause, left)
        left -= pause
        pause = min(2 * pause, _LONGEST)


def store_unavailable(what: str, error: StoreError) -> JobError:
    """For the caller; `error` itself is for the log."""
    reason = "is full" if isinstance(error, StoreFullError) else "cannot be reached or refuses"
    return JobError(code=ErrorCode.STORE_UNAVAILABLE, detail=f"{what}: the picture store {reason}; try again later")
