"""What a task's request says beside its body: how to repeat it, and whether to wait.

Read by hand, and documented here: through FastAPI's own parameters they cost a tenth of a whole request.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final, NamedTuple, Self, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError

T = TypeVar("T")

_Key = Annotated[str, Field(min_length=1, max_length=255)]
_key: Final = TypeAdapter[str](_Key)
_flag: Final = TypeAdapter(bool)


class Parameters(NamedTuple):
    """`prefer` has the header's lines, see `waiting.seconds_to_wait`."""

    idempotency_key: str | None
    prefer: Sequence[str]
    cancel_on_disconnect: bool

    @classmethod
    def of(cls, request: Request) -> Self:
        """Raises `RequestValidationError`."""
        key = request.headers.get("idempotency-key")
        if key is not None:
            _checked(_key, key, "header", "Idempotency-Key")
        cancel = request.query_params.get("cancel_on_disconnect") if request.scope["query_string"] else None
        return cls(
            key,
            request.headers.getlist("prefer"),
            cancel is not None and _checked(_flag, cancel, "query", "cancel_on_disconnect"),
        )


def _checked(adapter: TypeAdapter[T], value: str, place: str, name: str) -> T:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise RequestValidationError([entry | {"loc": (place, name)} for entry in error.errors()]) from error


DOCUMENTED: Final[list[dict[str, Any]]] = [
    {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": _key.json_schema(),
        "description": "repeat a request with the same key and get the same job, not a second one",
    },
    {
        "name": "Prefer",
        "in": "header",
        "schema": {"type": "string", "examples": ["wait=30"]},
        "description": "`wait=30`: answer when the job has ended, after 30 s at the latest; `wait`: as long as allowed",
    },
    {
        "name": "cancel_on_disconnect",
        "in": "query",
        "schema": _flag.json_schema() | {"default": False},
        "description": "with `Prefer: wait`: cancel the job if this connection breaks before it has ended",
    },
]
"""For OpenAPI."""
