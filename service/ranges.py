"""The Range header (RFC 9110, section 14)."""

import re
from typing import Final

_ONE: Final = re.compile(r"bytes=[ \t]*([0-9]{0,100})-([0-9]{0,100})[ \t]*", re.IGNORECASE)


class RangeNotSatisfiableError(Exception):
    """The range begins behind the end, or asks for the last zero bytes."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The asked bytes of `size`: from the first up to but not including the second. None: all of them, which is also
    the answer to several ranges and to what is no range, as the RFC allows. Raises `RangeNotSatisfiableError`."""
    asked = _ONE.fullmatch(header or "")
    if asked is None or asked[0].rstrip().endswith("=-"):
        return None
    first, last = asked.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiableError(f"{asked[0]} of {size} bytes; expected a first byte before the end")
    return start, end


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match names `etag` (section 13.1.2, weak comparison)."""
    given = {one.strip().removeprefix("W/") for one in (header or "").split(",")}
    return "*" in given or etag in given
