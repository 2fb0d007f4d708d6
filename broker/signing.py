"""Signed, expiring picture URLs for stores that cannot sign their own."""

import secrets
from collections.abc import Sequence

from itsdangerous import Signer
from redis.asyncio import Redis as AsyncRedis

from broker.connection import text
from contract import keys
from contract.settings import Settings


class SignatureInvalidError(Exception):
    """The signature was not made with one of our keys, for this object and this expiry."""


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

    def sign(self, key: str, expires: int) -> str:
        """The signature for reading store key `key` until Unix second `expires`; goes into the URL beside `expires`."""
        return self._signer.get_signature(f"{key}\n{expires}").decode()

    def check(self, key: str, expires: int, signature: str, now: float) -> None:
        """Raises `SignatureInvalidError` or `UrlExpiredError`."""
        if not self._signer.verify_signature(f"{key}\n{expires}", signature):
            raise SignatureInvalidError("the signature does not fit the picture and the expiry; ask for the job again")
        if now > expires:
            raise UrlExpiredError("the URL has expired; ask for the job again to get a fresh one")


async def signing_keys(connection: AsyncRedis, settings: Settings) -> list[str]:
    """The configured keys; without any, one that all gateways on this Redis share."""
    if settings.signing_keys:
        return [key.get_secret_value() for key in settings.signing_keys]
    await connection.set(keys.signing_key(), secrets.token_urlsafe(32), nx=True)
    shared = await connection.get(keys.signing_key())
    assert shared is not None
    return [text(shared)]
