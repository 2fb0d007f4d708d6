"""API keys: who calls, as an id that is safe to store and log."""

import hmac
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from pydantic import SecretStr

_ID_CHARS: Final = 16


class ApiKeys:
    """Knows only the keys' SHA-256. They are long and random, so a fast hash without salt is enough."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [sha256(key.get_secret_value().encode()).digest() for key in keys]

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def identify(self, key: str) -> str | None:
        """The id of an accepted key; None for any other. Compares with every key, in time that tells nothing."""
        given = sha256(key.encode()).digest()
        matches = [digest for digest in self._digests if hmac.compare_digest(digest, given)]
        return matches[0].hex()[:_ID_CHARS] if matches else None
