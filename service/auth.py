"""The dependency that every route under /v1 asks who calls."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from contract.errors import ErrorCode
from service.problems import ProblemError
from service.state import GatewayState

_bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer KEY`, where the server has API keys")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, description="the same key in a header of its own")


async def caller(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
) -> str | None:
    """The id of the caller's key; None on a gateway without keys. Raises the 401."""
    keys = GatewayState.of(request).api_keys
    if not keys.required:
        return None
    given = bearer.credentials if bearer else header
    if not given:
        raise _unauthorized("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
    key_id = keys.identify(given)
    if key_id is None:
        raise _unauthorized("the API key is not one of this server's; check it for cut-off or extra characters")
    return key_id


def _unauthorized(detail: str) -> ProblemError:
    return ProblemError(ErrorCode.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})


Caller = Annotated[str | None, Depends(caller)]
