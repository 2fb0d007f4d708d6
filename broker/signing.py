"""Signed, expiring picture URLs for stores that cannot sign their own."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any, Final

from itsdangerous import Signer
from redis.asyncio import Redis as AsyncRedis

from broker.connection import REDIS_UNAVAILABLE, text
from broker.refusals import LUA_EVEN_IF_FULL
from contract import keys
from contract.settings import Settings

_LIFE_SECONDS: Final = 86400  # a shared key signs for so long; then another takes its place
_READ_AGAIN_SECONDS: Final = 60.0
_KNOWN_SECONDS: Final = 300  # a new key signs nothing before every gateway has read it
_URL_SECONDS: Final = 3600  # the longest life of a URL: so long a key verifies after its last signature

_ROTATE: Final = (
    """
local now = tonumber(redis.call('TIME')[1])
local candidate, life, known, url = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local newest = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if #newest == 0 or now - tonumber(newest[2]) >= life then
"""
    + LUA_EVEN_IF_FULL
    + """
  redis.call('ZADD', KEYS[1], now, candidate)
end
local all = redis.call('ZREVRANGE', KEYS[1], 0, -1, 'WITHSCORES')
local signing, verifying = nil, {}
for i = 1, #all, 2 do
  local successor = i > 1 and tonumber(all[i - 1]) or now
  if i > 1 and now - successor > 2 * known + url then
    redis.call('ZREM', KEYS[1], all[i])
  elseif not signing and (now - tonumber(all[i + 1]) >= known or i + 1 == #all) then
    signing = all[i]
  else
    table.insert(verifying, all[i])
  end
end
table.insert(verifying, 1, signing)
return verifying
"""
)


class SignatureInvalidError(Exception):
    """The signature was not made with one of our keys, for this object, this content and this expiry."""


class UrlExpiredError(Exception):
    """The signature is ours; its time is over."""


class UrlSigner:
    """Signs with the first key, accepts all: put a new key first, drop the old one an hour later."""

    def __init__(self, secret_keys: Sequence[str]) -> None:
        if not secret_keys:
            raise ValueError(
                "no signing key was given: set DARKROOM_SIGNING_KEYS, or take `signing_keys` of the broker"
            )
        self._signer = Signer(list(reversed(secret_keys)), salt="darkroom.images")  # itsdangerous signs with the last

    def sign(self, key: str, sha256: str, expires: int) -> str:
        """The signature for reading store key `key`, whose content has this digest, until Unix second `expires`; goes
        into the URL beside both."""
        return self._signer.get_signature(f"{key}\n{sha256}\n{expires}").decode()

    def check(self, key: str, sha256: str, expires: int, signature: str, now: float) -> None:
        """Raises `SignatureInvalidError` or `UrlExpiredError`."""
        if not self._signer.verify_signature(f"{key}\n{sha256}\n{expires}", signature):
            raise SignatureInvalidError("the signature does not fit the picture and the expiry; ask for the job again")
        if now > expires:
            raise UrlExpiredError("the URL has expired; ask for the job again to get a fresh one")


class Signers:
    """Gives the signer of the moment: of the configured keys, or of keys that all gateways on this Redis share.

    Shared keys rotate daily. A new one first becomes known to every gateway and then signs; the one before it verifies
    for another hour. While Redis is away the last known keys serve.
    """

    def __init__(self, connection: AsyncRedis, settings: Settings) -> None:
        configured = [key.get_secret_value() for key in settings.signing_keys]
        self._signer = UrlSigner(configured) if configured else None
        self._read_at = float("inf") if configured else float("-inf")
        self._turn = asyncio.Lock()
        self._rotate: Any = connection.register_script(_ROTATE)

    async def get(self) -> UrlSigner:
        """Raises what Redis raises, where no key is known yet."""
        async with self._turn:
            if self._signer is None or time.monotonic() - self._read_at > _READ_AGAIN_SECONDS:
                try:
                    self._signer = UrlSigner(await self._shared_keys())
                except REDIS_UNAVAILABLE:
                    if self._signer is None:
                        raise
                self._read_at = time.monotonic()
            return self._signer

    async def _shared_keys(self) -> list[str]:
        """The one that signs now first."""
        arguments = [secrets.token_urlsafe(32), _LIFE_SECONDS, _KNOWN_SECONDS, _URL_SECONDS]
        return [text(key) for key in await self._rotate(keys=[keys.signing_keys()], args=arguments)]
