"""Reads a request's body, JSON or a form, into its model. Whatever is wrong becomes one problem."""

import asyncio
import json
from codecs import BOM_UTF8
from collections.abc import AsyncGenerator, Sequence
from difflib import get_close_matches
from typing import Any, Final, Self, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from contract.errors import ErrorCode
from service.forms import read_form
from service.problems import FieldError, ProblemError, expectation, pointer
from service.schemas import JSON_FIELDS, PICTURE_FIELDS, PictureRequest

R = TypeVar("R", bound=PictureRequest)

JSON_TYPE: Final = "application/json"
FORM_TYPE: Final = "multipart/form-data"
BODY_SECONDS: Final = 300.0
_SMALL_BYTES: Final = 64 * 1024
_MAX_ERRORS: Final = 50
_MAX_VALUES: Final = 20_000
"""In a JSON body, about. A request has some hundreds; millions take gigabytes before one of them is looked at."""
_SHOWN_CHARS: Final = 100


class Bodies:
    """All bodies that one gateway reads, of at most `max_held_bytes` at once, from their first byte until their jobs
    are queued; those of one API key take half of that at most. Small ones always pass: prompts without pictures."""

    def __init__(self, max_bytes: int, max_held_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_held_bytes = max_held_bytes
        self.held = 0  # bytes
        self._held_by: dict[str, int] = {}

    def share(self, api_key_id: str | None) -> "Share":
        """For one request; what it reads counts as held until the context ends."""
        return Share(self, api_key_id)

    def hold(self, count: int, api_key_id: str | None) -> bool:
        """Counts so many bytes more, or fewer. Returns whether they are within the bounds."""
        self.held += count
        if api_key_id is None:
            return self.held <= self.max_held_bytes
        own = self._held_by[api_key_id] = self._held_by.get(api_key_id, 0) + count
        if own == 0:
            del self._held_by[api_key_id]
        return self.held <= self.max_held_bytes and own <= self.max_held_bytes // 2


class Share:
    """What one request has added to the bytes that are held."""

    def __init__(self, bodies: Bodies, api_key_id: str | None) -> None:
        self._bodies = bodies
        self._api_key_id = api_key_id
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.hold(-self._bytes, self._api_key_id)

    async def read(self, request: Request, model: type[R]) -> R:
        """The body as its model. A field that JSON has twice counts as it stands last. Raises `ProblemError`: 400 not
        JSON or not a form, 408 too slow, 415 another type, 422 fields, 429 too much at once."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._read(request, model)
        except TimeoutError:
            detail = f"expected the body within {BODY_SECONDS:g} s; send smaller pictures"
            raise ProblemError(ErrorCode.REQUEST_TIMEOUT, detail, headers={"Connection": "close"}) from None

    async def _read(self, request: Request, model: type[R]) -> R:
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("identity", ""):
            raise ProblemError(
                ErrorCode.UNSUPPORTED_MEDIA_TYPE,
                f"the body is encoded as {coding[:_SHOWN_CHARS]}; send it as it is",
                [FieldError(header="Content-Encoding", detail="expected none")],
                headers={"Accept-Encoding": "identity"},
            )
        content_type = request.headers.get("content-type", "")
        chunks = self._counted(request)
        match content_type.partition(";")[0].strip().lower():
            case "application/json":
                body = b"".join([chunk async for chunk in chunks]).removeprefix(BOM_UTF8)
                if len(body) < _SMALL_BYTES:
                    return _from_json(body, model)
                return await asyncio.to_thread(_from_json, body, model)
            case "multipart/form-data":
                return _from_form(await read_form(content_type, chunks, self._bodies.max_bytes), model)
            case other:
                raise ProblemError(
                    ErrorCode.UNSUPPORTED_MEDIA_TYPE,
                    f"the content type is {other[:_SHOWN_CHARS] or 'missing'}; expected {JSON_TYPE} or {FORM_TYPE}",
                    [FieldError(header="Content-Type", detail=f"expected {JSON_TYPE} or {FORM_TYPE}")],
                    headers={"Accept-Post": f"{JSON_TYPE}, {FORM_TYPE}"},
                )

    async def _counted(self, request: Request) -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            self._bytes += len(chunk)
            if not self._bodies.hold(len(chunk), self._api_key_id) and self._bytes > _SMALL_BYTES:
                detail = f"the server already holds {self._bodies.held:,} bytes of requests; send this one again soon"
                raise ProblemError(ErrorCode.UPLOADS_BUSY, detail)
            yield chunk


def _from_json(body: bytes, model: type[R]) -> R:
    """Strict: numbers are numbers, not text and not true or false."""
    if len(body) > _MAX_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        detail = f"has more than {_MAX_VALUES:,} values; {_known_fields(model)}"
        raise ProblemError(ErrorCode.VALIDATION_FAILED, "nothing was queued", [FieldError(pointer="", detail=detail)])
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _refusal(error, model) from error


def _from_form(given: Sequence[tuple[str, str | bytes | None]], model: type[R]) -> R:
    """A form's values are text, so numbers and booleans are read from text, and lists from JSON text."""
    fields: dict[str, Any] = {}
    errors: list[FieldError] = []
    for name, value in given:
        if name in fields:
            errors.append(_fault(name, "given twice; expected once"))
        elif value is None:
            errors.append(_fault(name, "is not valid UTF-8; expected text in UTF-8, or a file"))
        elif isinstance(value, bytes) and name in model.model_fields and name not in PICTURE_FIELDS:
            errors.append(_fault(name, "got a file; expected text"))
        elif isinstance(value, str) and name in JSON_FIELDS:
            try:
                value = _json_of(value)
            except (ValueError, RecursionError) as error:
                errors.append(_fault(name, f"{error}; expected JSON: a list of objects"))
        fields[name] = value
    if errors:
        raise ProblemError(ErrorCode.VALIDATION_FAILED, "nothing was queued", errors)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, model) from error


def _json_of(text: str) -> Any:
    if len(text) > _SMALL_BYTES:
        raise ValueError(f"has {len(text):,} characters, of at most {_SMALL_BYTES:,}")
    return json.loads(text)


def _fault(name: str, detail: str) -> FieldError:
    return FieldError(pointer=_pointer(name), detail=detail)


def _pointer(*place: str | int) -> str:
    """Names may be as long as a body."""
    return pointer(*(part if isinstance(part, int) else part[:_SHOWN_CHARS] for part in place))


def _refusal(error: ValidationError, model: type[PictureRequest]) -> ProblemError:
    if error.error_count() > _MAX_ERRORS:
        detail = f"{error.error_count()} faults; {_known_fields(model)}"
        return ProblemError(ErrorCode.VALIDATION_FAILED, detail, [FieldError(pointer="", detail=detail)])
    entries = error.errors(include_url=False, include_context=False)
    if entries[0]["type"] == "json_invalid":
        return ProblemError(ErrorCode.INVALID_JSON, f"{entries[0]['msg']}; expected one JSON object")
    return ProblemError(ErrorCode.VALIDATION_FAILED, "nothing was queued", _field_errors(entries, model))


def _field_errors(entries: Sequence[ErrorDetails], model: type[PictureRequest]) -> list[FieldError]:
    return [
        FieldError(
            pointer=_pointer(*entry["loc"]),
            detail=_unknown(str(entry["loc"][-1]), model) if _is_unknown(entry) else expectation(entry),
        )
        for entry in entries
    ]


def _is_unknown(entry: ErrorDetails) -> bool:
    return entry["type"] == "extra_forbidden" and len(entry["loc"]) == 1


def _unknown(name: str, model: type[PictureRequest]) -> str:
    close = get_close_matches(name[:_SHOWN_CHARS], model.model_fields, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown field; {hint}{_known_fields(model)}"


def _known_fields(model: type[PictureRequest]) -> str:
    return f"expected only: {', '.join(sorted(model.model_fields))}"
