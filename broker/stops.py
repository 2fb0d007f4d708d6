"""Why a worker should end a running job at its next step."""

from enum import StrEnum


class Stop(StrEnum):
    """Value of the `stop` field of a running job's hash."""

    CANCELLED = "cancelled"
    DEADLINE = "deadline"
