"""API keys: who calls, as an id that is safe to store and log, and what that caller may do."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from broker.api_keys import Scope, digest, key_id, list_keys
from broker.connection import REDIS_UNAVAILABLE, connect
from broker.key_ring import KeyRing
from contract.settings import Settings

_USUAL_SCOPES: Final = frozenset({Scope.SUBMIT, Scope.READ})


@dataclass(frozen=True, slots=True)
class Caller:
    """Of one request; `key_id` None: came without a key, where none is needed."""

    key_id: str | None
    scopes: frozenset[Scope] = _USUAL_SCOPES

    def sees(self, owner: str | None) -> bool:
        """Whether jobs of the key `owner` exist for this caller."""
        return owner == self.key_id or Scope.ADMIN in self.scopes


class NoKeysError(RuntimeError):
    """A gateway that nobody could call."""


class ApiKeys:
    """Those of the settings, which make and see their own jobs, and those in Redis."""

    def __init__(self, settings: Settings, ring: KeyRing) -> None:
        secrets = [key.get_secret_value() for key in settings.api_keys]
        self._own: Mapping[str, str] = {key_id(secret): digest(secret) for secret in secrets}
        self._open = not self._own and allows_anonymous(settings)
        self._ring = ring

    async def anonymous(self) -> Caller | None:
        """Whoever brings no key; None where one is needed. Once a key was made it is needed for good: to revoke the
        last one must not open the door. Raises what redis raises."""
        return Caller(None) if self._open and not (await self._ring.table()).version else None

    async def identify(self, key: str) -> Caller | None:
        """Whose key this is; None: nobody's. Raises what redis raises, unless the settings have the key."""
        given = key_id(key)
        if given in self._own and hmac.compare_digest(self._own[given], digest(key)):
            return Caller(given)
        found = (await self._ring.table()).find(key)
        return None if found is None else Caller(found.id, found.scopes)

    async def accepts(self, caller: Caller) -> bool:
        """Whether who was let in would be let in still."""
        if caller.key_id is None:
            return await self.anonymous() is not None
        found = (await self._ring.table()).keys.get(caller.key_id)
        return caller.key_id in self._own or (found is not None and found.revoked_at is None)


def allows_anonymous(settings: Settings) -> bool:
    """As long as there is no key. Unasked only where nobody but this machine's users can call: not behind a proxy."""
    if settings.allow_anonymous is not None:
        return settings.allow_anonymous
    if settings.public_url or settings.trusted_proxies:
        return False
    try:
        return ip_address(settings.host).is_loopback
    except ValueError:
        return settings.host == "localhost"


def require_keys(settings: Settings) -> None:
    """Raises `NoKeysError` before a gateway listens to others than this machine's users with nobody allowed to call.

    While Redis is away none is raised: such a gateway starts, and asks everybody for a key.
    """
    if settings.api_keys or allows_anonymous(settings):
        return
    with connect(settings.redis_url) as connection:
        try:
            known = list_keys(connection)
        except REDIS_UNAVAILABLE:
            return
    if all(key.revoked_at is not None for key in known):
        proxied = " behind a proxy" if settings.public_url or settings.trusted_proxies else ""
        raise NoKeysError(
            f"the gateway would listen on {settings.host}{proxied}, and there is no API key that it could accept: make "
            "one with `darkroom keys create --name TEAM`, or set DARKROOM_API_KEYS; to let in whoever reaches the "
            "gateway, set DARKROOM_ALLOW_ANONYMOUS=true"
        )
