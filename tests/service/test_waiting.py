"""`Prefer: wait` as RFC 7240 writes it."""

import pytest

from service.waiting import seconds_to_wait


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, None),
        ("", None),
        ("respond-async", None),
        ("wait", 60.0),
        ("wait=5", 5.0),
        ('Wait = "5"', 5.0),
        ("respond-async, wait=5", 5.0),
        ("wait=5, handling=lenient", 5.0),
        ("wait=900", 60.0),
        ("wait=0", 0.0),
        ("wait=soon", None),
        ("wait=-1", None),
        ("await=5", None),
        ("wait-less=5", None),
    ],
)
def test_seconds_to_wait(prefer: str | None, seconds: float | None) -> None:
    assert seconds_to_wait(prefer, 60.0) == seconds
