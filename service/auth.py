"""The dependency that every route under /v1 asks who calls, and whether that caller may."""

from typing import Annotated, Final

import structlog
from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from broker.api_keys import Scope, is_damaged
from contract.errors import ErrorCode
from service.auth_keys import Caller
from service.problems import ProblemError
from service.state import GatewayState

_SCOPES: Final = (
    "A key has scopes: `submit` makes, cancels and deletes jobs, `read` looks at them, `admin` does both with the jobs "
    "of every key."
)
_bearer = HTTPBearer(
    auto_error=False, description=f"`Authorization: Bearer KEY`, where the server asks for a key. {_SCOPES}"
)
_header = APIKeyHeader(name="X-API-Key", auto_error=False, description="the same key in a header of its own")


async def caller(
    request: Request,
    needed: SecurityScopes,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
) -> Caller:
    """Raises the 401, the 403 and what redis raises."""
    keys = GatewayState.of(request).api_keys
    who = await keys.anonymous()
    if who is None:
        given = bearer.credentials if bearer else header
        if not given:
            raise _unauthorized("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        who = await keys.identify(given)
        if who is None and is_damaged(given):
            raise _unauthorized("the API key is not whole: characters were cut off, added or changed; copy it again")
        if who is None:
            raise _unauthorized("the API key is not one of this server's, or was revoked; ask for a new one")
        structlog.contextvars.bind_contextvars(key=who.key_id)
    for scope in needed.scopes:
        require(who, Scope(scope))
    return who


def require(who: Caller, scope: Scope) -> None:
    """Raises the 403."""
    if scope not in who.scopes:
        detail = f"this needs a key with the scope `{scope}`; yours has: {', '.join(sorted(who.scopes))}"
        header = f'Bearer error="insufficient_scope", scope="{scope}"'  # RFC 6750, section 3
        raise ProblemError(ErrorCode.FORBIDDEN, detail, headers={"WWW-Authenticate": header})


def _unauthorized(detail: str) -> ProblemError:
    return ProblemError(ErrorCode.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})


Reader = Annotated[Caller, Security(caller, scopes=[Scope.READ.value])]
Submitter = Annotated[Caller, Security(caller, scopes=[Scope.SUBMIT.value])]
