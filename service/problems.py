"""Every refusal is one RFC 9457 document, `application/problem+json`, with a stable `code` and one entry per field."""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from broker.connection import REDIS_UNAVAILABLE
from broker.limits import SubmitRefusedError
from broker.store import StoreError
from contract.errors import ErrorCode
from contract.spec import JobError
from service.quotas import fields_of_refusal

PROBLEM_TYPE: Final = "application/problem+json"
REQUEST_ID_SCOPE_KEY: Final = "darkroom.request_id"
PROBLEM_SCOPE_KEY: Final = "darkroom.problem"
"""Where an answer leaves its code for those who count."""
_SHOWN_CHARS: Final = 60
_SHOULD: Final = re.compile(r"^\w+ should (be|have) ")  # "Input should be ...", "String should have ..."
_CODE_OF_STATUS: Final = {
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    413: ErrorCode.BODY_TOO_LARGE,
    415: ErrorCode.UNSUPPORTED_MEDIA_TYPE,
}
COME_BACK: Final = frozenset({429, 503})
"""Statuses whose answers always carry Retry-After."""
_RETRY_SOON: Final = {"Retry-After": "2"}


class FieldError(BaseModel):
    """What is wrong with one field, and what was expected there."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"pointer": "/steps", "detail": "got 0; expected ≥ 1"}]})

    pointer: str | None = Field(default=None, description="JSON pointer (RFC 6901) into the body, e.g. /steps")
    parameter: str | None = Field(default=None, description="name of a query or path parameter")
    header: str | None = Field(default=None, description="name of a request header")
    detail: str


class Problem(BaseModel):
    """A refusal (RFC 9457)."""

    type: str = Field(examples=["urn:darkroom:problem:validation_failed"])
    title: str = Field(description="the code in words", examples=["The request is not valid"])
    status: int = Field(description="the HTTP status", examples=[422])
    code: ErrorCode = Field(description="stable name of the problem; act on this one")
    detail: str | None = Field(default=None, description="what happened here and what to do")
    errors: list[FieldError] | None = Field(default=None, description="one entry per field, for validation")
    request_id: str | None = Field(default=None, description="also in the X-Request-ID header and in the log")


class ProblemError(Exception):
    """Raised anywhere below a route; answered as its problem."""

    def __init__(
        self,
        code: ErrorCode,
        detail: str | None = None,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail or code.summary)
        self.code = code
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})


def problem_of(
    code: ErrorCode, detail: str | None = None, errors: Sequence[FieldError] = (), request_id: str | None = None
) -> Problem:
    return Problem(
        type=f"urn:darkroom:problem:{code.value}",
        title=code.summary,
        status=code.status,
        code=code,
        detail=detail,
        errors=list(errors) or None,
        request_id=request_id,
    )


def problem_of_job(error: JobError) -> Problem:
    """How a failed job shows why."""
    return problem_of(error.code, error.detail)


def problem_json(problem: Problem) -> bytes:
    """ASCII, since a field's name in `errors` may hold what UTF-8 cannot (a lone surrogate)."""
    fields = problem.model_dump(exclude_none=True, mode="json", warnings=False)
    return json.dumps(fields, allow_nan=False).encode("ascii")


def render(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        problem_json(problem), status_code=problem.status, media_type=PROBLEM_TYPE, headers=dict(headers or {})
    )


def pointer(*parts: str | int) -> str:
    """The JSON pointer to a field (RFC 6901, section 3)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def shown(value: object) -> str:
    """A value as an error text repeats it: scalars only, and not much of them."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a value of another type ({_JSON_TYPES.get(type(value), type(value).__name__)})"
    text = json.dumps(value) if not isinstance(value, int) or value.bit_length() < 256 else "a very large number"
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"


_JSON_TYPES: Final[dict[type, str]] = {dict: "object", list: "array", bytes: "file"}


def expectation(error: ErrorDetails) -> str:
    """What pydantic expected, and what it got, in one line."""
    if error["type"] == "missing":
        return "this field is required"
    message = _SHOULD.sub("expected ", error["msg"].removeprefix("Value error, "))
    if error["type"] in ("value_error", "extra_forbidden"):
        return message
    return f"{message}; got {shown(error['input'])}"


def parameter_error(error: ErrorDetails) -> FieldError:
    """Of FastAPI's own validation: its location begins with where the value came from."""
    place, *names = error["loc"]
    name = ".".join(map(str, names))
    if place == "header":
        return FieldError(header=name, detail=expectation(error))
    return FieldError(parameter=name, detail=expectation(error))


def answer(
    request: Request,
    code: ErrorCode,
    detail: str | None = None,
    errors: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response for a problem that `request` met."""
    request.scope[PROBLEM_SCOPE_KEY] = code
    given = (_RETRY_SOON if code.status in COME_BACK else {}) | dict(headers or {})
    return render(problem_of(code, detail, errors, request.scope.get(REQUEST_ID_SCOPE_KEY)), given)


async def _on_problem(request: Request, error: ProblemError) -> Response:
    return answer(request, error.code, error.detail, error.errors, error.headers)


async def _on_invalid_parameters(request: Request, error: RequestValidationError) -> Response:
    errors = [parameter_error(entry) for entry in error.errors()]
    return answer(request, ErrorCode.VALIDATION_FAILED, "a parameter is not valid", errors)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """What the framework itself refuses: no such address, no such method there."""
    code, headers = _CODE_OF_STATUS.get(error.status_code), dict(error.headers or {})
    if code is ErrorCode.METHOD_NOT_ALLOWED:
        # The framework names the methods of the first route at the address alone.
        here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted({method for route in here for method in getattr(route, "methods", ())}))
    if code is not None:
        return answer(request, code, f"{request.method} {request.url.path}", headers=headers)
    problem = {
        "type": "about:blank",
        "title": HTTPStatus(error.status_code).phrase,
        "status": error.status_code,
        "detail": str(error.detail),
        "request_id": request.scope.get(REQUEST_ID_SCOPE_KEY),
    }
    return Response(json.dumps(problem), error.status_code, headers, PROBLEM_TYPE)


async def _on_refused_submit(request: Request, error: SubmitRefusedError) -> Response:
    errors = []
    if error.code is ErrorCode.IDEMPOTENCY_MISMATCH:
        errors = [FieldError(header="Idempotency-Key", detail="expected a key that was not used with another body")]
    return answer(request, error.code, str(error), errors, fields_of_refusal(error))


async def _on_redis_away(request: Request, _: Exception) -> Response:
    detail = "the queue does not answer; nothing was changed that was not confirmed: repeat the request"
    return answer(request, ErrorCode.BROKER_UNAVAILABLE, detail)


async def _on_store_away(request: Request, _: StoreError) -> Response:
    detail = "the picture store does not answer; repeat the request"
    return answer(request, ErrorCode.STORE_UNAVAILABLE, detail)


async def _on_disconnect(_request: Request, _: ClientDisconnect) -> Response:
    """Nobody reads this: the client left while it sent its body."""
    return Response(status_code=400)


def install(app: FastAPI) -> None:
    """Makes every error that is expected a problem; `middleware.Defects` does so with the others."""
    handlers: dict[Any, Any] = {
        ProblemError: _on_problem,
        RequestValidationError: _on_invalid_parameters,
        HTTPException: _on_http_error,
        SubmitRefusedError: _on_refused_submit,
        StoreError: _on_store_away,
        ClientDisconnect: _on_disconnect,
    }
    handlers.update(dict.fromkeys(REDIS_UNAVAILABLE, _on_redis_away))
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
