"""Running out of memory: how it shows, what can be freed, and how many rows are dared after it."""

from __future__ import annotations

import gc

import torch

_GROWTH = 0.1


def is_out_of_memory(error: BaseException) -> bool:
    # CPU allocations fail with a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_device_lost(error: BaseException) -> bool:
    """After such an error every later call on the device fails as well: only a fresh process helps."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    lost: type[Exception] | None = getattr(torch, "AcceleratorError", None)
    return (lost is not None and isinstance(error, lost)) or "CUDA error" in str(error)


def free_caches() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Ceiling:
    """How much may be held at once: `limit` at most, half of what was held when memory ran out, then slowly more."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.value = limit

    def ran_out(self, held: float) -> None:
        self.value = max(1.0, min(self.value, held) / 2)

    def finished(self) -> None:
        """A picture came through."""
        self.value = min(self._limit, self.value + _GROWTH)
