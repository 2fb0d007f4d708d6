"""Reads a request's body, JSON or a form, into its model. Whatever is wrong becomes one problem."""

import asyncio
import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from contract.errors import ErrorCode
from service.problems import FieldError, ProblemError, expectation, pointer
from service.schemas import JSON_FIELDS, PICTURE_FIELDS, PictureRequest

R = TypeVar("R", bound=PictureRequest)

JSON_TYPE: Final = "application/json"
FORM_TYPE: Final = "multipart/form-data"
_THREAD_BYTES: Final = 64 * 1024
_MAX_ERRORS: Final = 50


async def read_request(request: Request, model: type[R], max_bytes: int) -> R:
    """Raises `ProblemError`: 400 not JSON or not a form, 415 another type, 422 fields."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == JSON_TYPE:
        body = await request.body()
        if len(body) < _THREAD_BYTES:
            return _from_json(body, model)
        return await asyncio.to_thread(_from_json, body, model)
    if content_type == FORM_TYPE:
        return await _from_form(request, model, max_bytes)
    raise ProblemError(
        ErrorCode.UNSUPPORTED_MEDIA_TYPE,
        f"the content type is {content_type or 'missing'}; expected {JSON_TYPE} or {FORM_TYPE}",
        [FieldError(header="Content-Type", detail=f"expected {JSON_TYPE} or {FORM_TYPE}")],
        headers={"Accept-Post": f"{JSON_TYPE}, {FORM_TYPE}"},
    )


def _from_json(body: bytes, model: type[R]) -> R:
    """Strict: numbers are numbers, not text and not true or false."""
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _refusal(error, model) from error


async def _from_form(request: Request, model: type[R], max_bytes: int) -> R:
    """A form's values are text, so numbers and booleans are read from text, and lists from JSON text."""
    fields: dict[str, Any] = {}
    errors: list[FieldError] = []
    try:
        async with request.form(max_files=8, max_fields=64, max_part_size=max_bytes) as form:
            for name, value in form.multi_items():
                if name in fields:
                    errors.append(FieldError(pointer=pointer(name), detail="given twice; expected once"))
                if isinstance(value, UploadFile) and name in model.model_fields and name not in PICTURE_FIELDS:
                    errors.append(FieldError(pointer=pointer(name), detail="got a file; expected text"))
                fields[name] = await value.read() if isinstance(value, UploadFile) else value
    except HTTPException as error:
        detail = f"{str(error.detail).rstrip('.')}; expected a form as RFC 7578 has it"
        raise ProblemError(ErrorCode.INVALID_MULTIPART, detail) from error
    for name in JSON_FIELDS:
        try:
            if isinstance(fields.get(name), str):
                fields[name] = json.loads(fields[name])
        except (ValueError, RecursionError) as error:
            errors.append(FieldError(pointer=pointer(name), detail=f"{error}; expected JSON: a list of objects"))
    if errors:
        raise ProblemError(ErrorCode.VALIDATION_FAILED, "nothing was queued", errors)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, model) from error


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
            pointer=pointer(*entry["loc"]),
            detail=_unknown(str(entry["loc"][-1]), model) if _is_unknown(entry) else expectation(entry),
        )
        for entry in entries
    ]


def _is_unknown(entry: ErrorDetails) -> bool:
    return entry["type"] == "extra_forbidden" and len(entry["loc"]) == 1


def _unknown(name: str, model: type[PictureRequest]) -> str:
    close = get_close_matches(name[:100], model.model_fields, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown field; {hint}{_known_fields(model)}"


def _known_fields(model: type[PictureRequest]) -> str:
    return f"expected only: {', '.join(sorted(model.model_fields))}"
