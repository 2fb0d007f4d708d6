"""Finished pictures, for stores that cannot sign URLs of their own. The signature is the permission: no key needed."""

import time
from pathlib import PurePosixPath
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Response

from broker.signing import SignatureInvalidError, UrlExpiredError
from broker.store import ObjectMissingError
from contract.errors import ErrorCode
from contract.spec import OutputFormat
from service.problems import ProblemError
from service.routes.common import State, problems

router = APIRouter(prefix="/v1/images", tags=["pictures"])
_CONTENT_TYPES: Final = {f".{form.value}": form.content_type for form in OutputFormat}


@router.get(
    "/{key:path}",
    response_class=Response,
    responses={
        200: {"description": "The file", "content": {kind: {} for kind in _CONTENT_TYPES.values()}},
        **problems(
            ErrorCode.URL_INVALID,
            ErrorCode.URL_EXPIRED,
            ErrorCode.IMAGE_NOT_FOUND,
            ErrorCode.VALIDATION_FAILED,
            ErrorCode.STORE_UNAVAILABLE,
        ),
    },
)
async def get_image(
    state: State,
    key: Annotated[str, Path(description="from a job's `images`", examples=["outputs/JOB/EXECUTION/0.png"])],
    expires: Annotated[int, Query(ge=0, le=2**40, description="Unix seconds", examples=[1800000000])],
    signature: Annotated[str, Query(max_length=200, description="of key and expiry", examples=["c2lnbmF0dXJl"])],
) -> Response:
    """A finished picture, through the URL that a job gave."""
    now = time.time()
    try:
        (await state.signer()).check(key, expires, signature, now)
        data = await state.broker.store.get_async(key)
    except SignatureInvalidError as error:
        raise ProblemError(ErrorCode.URL_INVALID, str(error)) from error
    except UrlExpiredError as error:
        raise ProblemError(ErrorCode.URL_EXPIRED, str(error)) from error
    except ObjectMissingError as error:
        raise ProblemError(
            ErrorCode.IMAGE_NOT_FOUND, "the picture is gone; its job was deleted or is too old"
        ) from error
    headers = {"Cache-Control": f"private, max-age={max(0, int(expires - now))}, immutable"}
    return Response(data, media_type=_CONTENT_TYPES[PurePosixPath(key).suffix], headers=headers)
