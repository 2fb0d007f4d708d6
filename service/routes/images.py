"""Finished pictures, for stores that cannot sign URLs of their own. The signature is the permission: no key needed.

A picture never changes under its URL, so that its digest is its entity tag and caches may keep it for the URL's life.
"""

import time
from pathlib import PurePosixPath
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from broker.signing import SignatureInvalidError, UrlExpiredError
from broker.store import ObjectMissingError
from contract import keys
from contract.errors import ErrorCode
from contract.spec import OutputFormat
from service.problems import ProblemError
from service.ranges import RangeNotSatisfiableError, etag_matches, parse_range
from service.routes.common import Responses, State, problems

router = APIRouter(prefix="/v1/images", tags=["pictures"])
_CONTENT_TYPES: Final = {f".{form.value}": form.content_type for form in OutputFormat}
_FILE: Final[dict[str, Any]] = {kind: {} for kind in _CONTENT_TYPES.values()}
_RESPONSES: Final[Responses] = {
    200: {"description": "The file", "content": _FILE},
    206: {"description": "The bytes that Range asked for", "content": _FILE},
    304: {"description": "If-None-Match names this file"},
    **problems(
        ErrorCode.URL_INVALID,
        ErrorCode.URL_EXPIRED,
        ErrorCode.IMAGE_NOT_FOUND,
        ErrorCode.RANGE_NOT_SATISFIABLE,
        ErrorCode.VALIDATION_FAILED,
        ErrorCode.STORE_UNAVAILABLE,
    ),
}


@router.get("/{key:path}", response_class=Response, responses=_RESPONSES)
@router.head("/{key:path}", response_class=Response, responses=_RESPONSES)
async def get_image(
    request: Request,
    state: State,
    key: Annotated[str, Path(description="from a job's `images`", examples=["outputs/JOB/EXECUTION/0.png"])],
    sha256: Annotated[str, Query(max_length=64, description="of the file, in hex", examples=["0" * 64])],
    expires: Annotated[int, Query(ge=0, le=2**40, description="Unix seconds", examples=[1800000000])],
    signature: Annotated[str, Query(max_length=200, description="of all these", examples=["c2lnbmF0dXJl"])],
    range_: Annotated[str | None, Header(alias="Range", description="one range of bytes")] = None,
    if_range: Annotated[str | None, Header(description="entity tag; of another one all bytes come")] = None,
    if_none_match: Annotated[str | None, Header(description="entity tags that are known already")] = None,
) -> Response:
    """A finished picture, through the URL that a job gave."""
    now = time.time()
    try:
        (await state.signer()).check(key, sha256, expires, signature, now)
    except SignatureInvalidError as error:
        raise ProblemError(ErrorCode.URL_INVALID, str(error)) from error
    except UrlExpiredError as error:
        raise ProblemError(ErrorCode.URL_EXPIRED, str(error)) from error
    etag = f'"{sha256}"'
    headers = {
        "ETag": etag,
        "Cache-Control": f"private, max-age={int(expires - now)}, immutable",
        "Content-Disposition": f'inline; filename="{keys.file_name(key)}"',
        "Accept-Ranges": "bytes",
    }
    media_type = _CONTENT_TYPES[PurePosixPath(key).suffix]
    store = state.broker.store
    try:
        size = await store.size_async(key)
        if etag_matches(if_none_match, etag):
            return Response(status_code=304, headers=headers)
        if request.method == "HEAD":
            return Response(headers=headers | {"Content-Length": str(size)}, media_type=media_type)
        part = parse_range(range_, size) if if_range in (None, etag) else None
        start, end = part or (0, size)
        chunks = await store.stream_async(key, start, end)
    except ObjectMissingError as error:
        raise ProblemError(
            ErrorCode.IMAGE_NOT_FOUND, "the picture is gone; its job was deleted or is too old"
        ) from error
    except RangeNotSatisfiableError as error:
        headers = {"Content-Range": f"bytes */{size}"}
        raise ProblemError(ErrorCode.RANGE_NOT_SATISFIABLE, str(error), headers=headers) from error
    headers["Content-Length"] = str(end - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return StreamingResponse(chunks, 200 if part is None else 206, headers, media_type)
