"""A key's limits as response fields: RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers-11).

Policy "submits" is the token bucket, "jobs" the unfinished jobs of one model. Both are structured fields (RFC 9651).
"""

from math import ceil, floor
from typing import Any, Final

from broker.limits import SubmitRefusedError
from broker.quotas import Limits, Quota
from contract.errors import ErrorCode

HEADERS: Final[dict[str, dict[str, Any]]] = {
    "RateLimit-Policy": {
        "description": "the limits of your key: `submits` at once and in the long run, unfinished `jobs` for one model",
        "schema": {"type": "string", "examples": ['"submits";q=200;w=4, "jobs";q=500;qu="concurrent-requests"']},
    },
    "RateLimit": {
        "description": "what is left of them, and over how many seconds to spread it to be never refused",
        "schema": {"type": "string", "examples": ['"submits";r=199;t=4, "jobs";r=499']},
    },
}


def fields_of(quota: Quota) -> dict[str, str]:
    """After an accepted submit."""
    left = floor(quota.tokens)
    return _fields(quota, f";t={_spread(quota) if left else _until_next(quota)}")


def fields_of_refusal(error: SubmitRefusedError) -> dict[str, str]:
    """With Retry-After, in whole seconds and never too soon; empty for a refusal that no limit made. A window is given
    only for the limit that was met, since it must not end after Retry-After."""
    if error.retry_after is None:
        return {}
    seconds = max(1, ceil(error.retry_after))
    window = f";t={seconds}" if error.code is ErrorCode.RATE_LIMITED else ""
    return {"Retry-After": str(seconds), **_fields(error.quota, window)}


def _fields(quota: Quota, window: str) -> dict[str, str]:
    limits = quota.limits
    jobs = max(0, limits.max_waiting - quota.unfinished)
    return {
        "RateLimit-Policy": f'{_bucket(limits)}, "jobs";q={limits.max_waiting};qu="concurrent-requests"',
        "RateLimit": f'"submits";r={floor(quota.tokens)}{window}, "jobs";r={jobs}',
    }


def _bucket(limits: Limits) -> str:
    """The window is the time in which an empty bucket fills, in whole seconds; the quota what flows in then."""
    window = max(1, ceil(limits.rate_burst / limits.rate_per_second))
    return f'"submits";q={max(limits.rate_burst, floor(limits.rate_per_second * window))};w={window}'


def _spread(quota: Quota) -> int:
    """Seconds in which as many tokens flow in as are left: whoever spreads these over it keeps to the rate."""
    return max(1, ceil(floor(quota.tokens) / quota.limits.rate_per_second))


def _until_next(quota: Quota) -> int:
    return max(1, ceil((1 - quota.tokens) / quota.limits.rate_per_second))
