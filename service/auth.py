"""The dependency that every route under /v1 asks who calls, and whether that caller may."""

from typing import Annotated, Final

import structlog
from fastapi import Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers

from broker.api_keys import Scope, is_damaged
from contract.errors import ErrorCode
from service.auth_keys import ApiKeys, Caller
from service.problems import ProblemError
from service.state import GatewayState

BEARER: Final = "HTTPBearer"
"""In the OpenAPI document: the scheme of `KeyWith`. The other way to send a key is put beside it there."""
KEY_HEADER: Final = "X-API-Key"
_SCOPES: Final = (
    "A key has scopes: `submit` makes, cancels and deletes jobs, `read` looks at them, `admin` does both with the jobs "
    "of every key."
)
_NOT_ACCEPTED: Final = "the API key is not one of this server's, or was revoked; ask for a new one"


class KeyWith(SecurityBase):
    """Asks for a key with a scope; FastAPI's own classes would be three dependencies in place of one."""

    def __init__(self, scope: Scope) -> None:
        self.model = HTTPBearer(description=f"`Authorization: Bearer KEY`, where the server asks for a key. {_SCOPES}")
        self.scheme_name = BEARER
        self._scope = scope

    async def __call__(self, request: Request) -> Caller:
        """Raises the 401, the 403 and what redis raises."""
        keys = GatewayState.of(request).api_keys
        who = await keys.anonymous() or await _identified(request.headers, keys)
        require(who, self._scope)
        return who


async def _identified(headers: Headers, keys: ApiKeys) -> Caller:
    scheme, credentials = get_authorization_scheme_param(headers.get("authorization"))
    given = credentials if credentials and scheme.lower() == "bearer" else headers.get(KEY_HEADER)
    if not given:
        raise _unauthorized(f"send a key as `Authorization: Bearer KEY` or `{KEY_HEADER}: KEY`")
    who = await keys.identify(given)
    if who is None and is_damaged(given):
        raise _unauthorized("the API key is not whole: characters were cut off, added or changed; copy it again")
    if who is None:
        raise _unauthorized(_NOT_ACCEPTED)
    structlog.contextvars.bind_contextvars(key=who.key_id)
    return who


async def check_still_accepted(who: Caller, state: GatewayState) -> None:
    """Raises the 401 where the key was revoked while its request waited."""
    if not await state.api_keys.accepts(who):
        raise _unauthorized(_NOT_ACCEPTED)


def require(who: Caller, scope: Scope) -> None:
    """Raises the 403."""
    if scope not in who.scopes:
        detail = f"this needs a key with the scope `{scope}`; yours has: {', '.join(sorted(who.scopes))}"
        header = f'Bearer error="insufficient_scope", scope="{scope}"'  # RFC 6750, section 3
        raise ProblemError(ErrorCode.FORBIDDEN, detail, headers={"WWW-Authenticate": header})


def _unauthorized(detail: str) -> ProblemError:
    return ProblemError(ErrorCode.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})


Reader = Annotated[Caller, Security(KeyWith(Scope.READ), scopes=[Scope.READ.value])]
Submitter = Annotated[Caller, Security(KeyWith(Scope.SUBMIT), scopes=[Scope.SUBMIT.value])]
