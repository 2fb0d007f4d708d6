"""API keys in Redis: made, listed and revoked by `darkroom keys`, read by every gateway.

A key is random and shown once; Redis holds its SHA-256. It is too long to be guessed, so a fast hash without salt is
enough. Revoked keys stay on the list, so that the ids in logs and jobs keep their names.
"""

import hmac
import secrets
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final, Self
from uuid import uuid4

from pydantic import Field, ValidationError, field_validator
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.client import Pipeline

from broker.connection import redis_time, text
from broker.quotas import OwnLimits
from contract import keys
from contract.spec import Document, Name

_PREFIX: Final = "dk_"
_SECRET_BYTES: Final = 32
_SECRET_CHARS: Final = 43  # of 256 bits in base 62
_SUM_CHARS: Final = 6  # of 32 bits in base 62
_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_CHARS: Final = 16


class Scope(StrEnum):
    """What a key may do: make, cancel and delete jobs; look at them; and both with the jobs of every key."""

    SUBMIT = "submit"
    READ = "read"
    ADMIN = "admin"


class ApiKey(Document):
    """One key. `sha256` in hex, `created_at` and `revoked_at` in Unix seconds by Redis' clock."""

    id: Name
    name: str = Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")
    scopes: frozenset[Scope] = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    limits: OwnLimits = OwnLimits()
    created_at: float
    revoked_at: float | None = None

    @field_validator("scopes")
    @classmethod
    def _admin_has_all(cls, scopes: frozenset[Scope]) -> frozenset[Scope]:
        return frozenset(Scope) if Scope.ADMIN in scopes else scopes

    def fits(self, key: str) -> bool:
        """In time that tells nothing of the digest."""
        return hmac.compare_digest(self.sha256, digest(key))


@dataclass(frozen=True, slots=True)
class KeyTable:
    """All keys by id, revoked ones too, as they were at `version`: the same version, the same keys; "": none was ever
    made. A key that this process cannot read, since a newer one wrote it, is none."""

    version: str
    keys: Mapping[str, ApiKey]

    @classmethod
    def read(cls, version: bytes | None, documents: Mapping[bytes, bytes]) -> Self:
        made: dict[str, ApiKey] = {}
        for name, document in documents.items():
            with suppress(ValidationError):
                made[text(name)] = ApiKey.model_validate_json(document)
        return cls(text(version or b""), made)

    def find(self, key: str) -> ApiKey | None:
        """The accepted key that this is."""
        found = self.keys.get(key_id(key))
        return found if found is not None and found.revoked_at is None and found.fits(key) else None


def digest(key: str) -> str:
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def key_id(key: str) -> str:
    """Safe to store, show and log; the same for the same key."""
    return digest(key)[:_ID_CHARS]


def new_secret() -> str:
    """`dk_`, 256 random bits and a checksum, in letters and digits: one word to a double click."""
    body = _base62(int.from_bytes(secrets.token_bytes(_SECRET_BYTES)), _SECRET_CHARS)
    return f"{_PREFIX}{body}{_checksum(body)}"


def is_damaged(key: str) -> bool:
    """Whether this was one of our keys before characters of it got lost or changed."""
    if not key.startswith(_PREFIX):
        return False
    body, checksum = key[len(_PREFIX) : -_SUM_CHARS], key[-_SUM_CHARS:]
    return len(body) != _SECRET_CHARS or not key.isascii() or checksum != _checksum(body)


def create_key(
    connection: Redis, name: str, scopes: Collection[Scope], limits: OwnLimits | None = None
) -> tuple[ApiKey, str]:
    """Stores a new key; returns it with its secret, which nobody can read again. Raises pydantic's ValidationError."""
    secret = new_secret()
    key = ApiKey(
        id=key_id(secret),
        name=name,
        scopes=frozenset(scopes),
        sha256=digest(secret),
        limits=limits or OwnLimits(),
        created_at=redis_time(connection),
    )
    pipeline = connection.pipeline()
    _write(pipeline, key)
    pipeline.execute()
    return key, secret


def list_keys(connection: Redis) -> list[ApiKey]:
    """Oldest first, revoked ones too."""
    documents: Any = connection.hgetall(keys.api_keys())
    return sorted(KeyTable.read(None, documents).keys.values(), key=lambda key: key.created_at)


def revoke_key(connection: Redis, revoked_id: str) -> ApiKey | None:
    """The key, revoked from now on (or since it first was); None: there is no such key."""
    now = redis_time(connection)
    return _change(connection, revoked_id, lambda key: {"revoked_at": key.revoked_at or now})


def limit_key(connection: Redis, limited_id: str, limits: OwnLimits) -> ApiKey | None:
    """The key, with these limits in place of those that it had; None: there is no such key."""
    return _change(connection, limited_id, lambda _: {"limits": limits})


def _change(connection: Redis, changed_id: str, changes: Callable[[ApiKey], dict[str, Any]]) -> ApiKey | None:
    """Undoes nothing that another changes meanwhile."""

    def change(pipeline: Pipeline) -> ApiKey | None:
        document: Any = pipeline.hget(keys.api_keys(), changed_id)
        pipeline.multi()
        if document is None:
            return None
        before = ApiKey.model_validate_json(document)
        after = before.model_copy(update=changes(before))
        if after != before:
            _write(pipeline, after)
        return after

    answer: Any = connection.transaction(change, keys.api_keys(), value_from_callable=True)  # type: ignore[arg-type]
    return answer if isinstance(answer, ApiKey) else None


async def read_table(connection: AsyncRedis, known: KeyTable | None) -> KeyTable:
    """The keys as they are; `known` itself, for one short question, where nothing has changed since."""
    version = await connection.get(keys.api_keys_version())
    if known is not None and known.version == text(version or b""):
        return known
    pipeline = connection.pipeline(transaction=True)
    pipeline.get(keys.api_keys_version())
    pipeline.hgetall(keys.api_keys())
    version, documents = await pipeline.execute()
    return KeyTable.read(version, documents)


def _write(pipeline: Pipeline, key: ApiKey) -> None:
    """A version is never used twice, so that a Redis that lost its last second is noticed as well."""
    pipeline.hset(keys.api_keys(), key.id, key.model_dump_json())
    pipeline.set(keys.api_keys_version(), uuid4().hex)


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode("utf-8", "surrogatepass")), _SUM_CHARS)


def _base62(number: int, width: int) -> str:
    digits = ""
    while number:
        number, rest = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[rest] + digits
    return digits.rjust(width, _ALPHABET[0])
