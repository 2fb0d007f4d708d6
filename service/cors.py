"""Which pages of other origins may call from a browser. Keys travel in headers, never in cookies, so no credentials."""

from collections.abc import Sequence
from typing import Any, Final

_METHODS: Final = ("GET", "POST", "DELETE")
_REQUEST_HEADERS: Final = (
    "Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer", "X-API-Key", "X-Request-ID",
)  # fmt: skip
_ANSWER_HEADERS: Final = (
    "Location", "Preference-Applied", "RateLimit", "RateLimit-Policy", "Retry-After", "X-Request-ID",
)  # fmt: skip
_PREFLIGHT_SECONDS: Final = 600


def cors_options(origins: Sequence[str]) -> dict[str, Any]:
    """Of Starlette's middleware; "*" among the origins allows every one."""
    return {
        "allow_origins": list(origins),
        "allow_methods": _METHODS,
        "allow_headers": _REQUEST_HEADERS,
        "expose_headers": _ANSWER_HEADERS,
        "max_age": _PREFLIGHT_SECONDS,
    }
