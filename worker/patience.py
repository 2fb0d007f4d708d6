"""The store may be away for a moment: a few tries, further and further apart."""

import time
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from broker.store import ObjectMissingError, StoreError

P = ParamSpec("P")
T = TypeVar("T")

PAUSES: Final = (0.2, 0.5, 1.0, 2.0)


def patiently(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`call`, again after each pause while it raises `StoreError`; a missing object is missing at once."""
    for pause in PAUSES:
        try:
            return call(*args, **kwargs)
        except ObjectMissingError:
            raise
        except StoreError:
            time.sleep(pause)
    return call(*args, **kwargs)
