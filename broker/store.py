"""The picture store: one API over a local folder, memory and the cloud stores."""

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store, from_url

_FAULTS: Final = (BaseError, OSError, ValueError)
_TORN: Final = re.compile(r"#\d+$")  # obstore writes KEY#NUMBER and renames it
_SIGNING: Final = (S3Store, GCSStore, AzureStore)


class StoreError(Exception):
    """The store is away, refuses, or is full."""


class StoreFullError(StoreError):
    """No space is left. Nothing was written, and what stood under the key before still stands."""


class ObjectMissingError(StoreError):
    """There is no object under this key."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """`size` in bytes, `modified` in Unix seconds by the store's clock."""

    key: str
    size: int
    modified: float


class Store:
    """Opens what `url` names: file:PATH (made if missing), memory:, s3://, gs:// or az://.

    `public_endpoint` replaces the endpoint of S3 in signed URLs. Credentials come from the environment, as each cloud's
    own tools read them. Methods raise `StoreError`; thread-safe.
    """

    folder: Path | None
    """Where a local store keeps its objects; None for the others."""

    def __init__(self, url: str, public_endpoint: str | None = None) -> None:
        self._store = _open(url)
        self._errors = dict.fromkeys(("put", "get", "list", "delete", "sign"), 0)
        self._lock = threading.Lock()
        self.folder = self._store.prefix if isinstance(self._store, LocalStore) else None
        self._signing = self._store
        if public_endpoint is not None and isinstance(self._store, S3Store):
            self._signing = from_url(url, config={"endpoint": public_endpoint})

    @property
    def errors(self) -> Mapping[str, int]:
        """How many calls have raised `StoreError` so far, by operation; that an object is missing is no error."""
        return self._errors

    @property
    def signs(self) -> bool:
        """Whether `sign` gives URLs; otherwise the gateway serves the pictures itself."""
        return isinstance(self._signing, _SIGNING)

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Whole or not at all; replaces what was there."""
        try:
            self._store.put(key, data, attributes=self._attributes(content_type))
        except _FAULTS as error:
            raise self._failed("put", error, key) from error

    async def put_async(self, key: str, data: bytes, content_type: str) -> None:
        try:
            await self._store.put_async(key, data, attributes=self._attributes(content_type))
        except _FAULTS as error:
            raise self._failed("put", error, key) from error

    def get(self, key: str) -> bytes:
        """Raises `ObjectMissingError`."""
        try:
            return bytes(self._store.get(key).bytes())
        except _FAULTS as error:
            raise self._failed("get", error, key) from error

    async def get_async(self, key: str) -> bytes:
        try:
            return bytes(await (await self._store.get_async(key)).bytes_async())
        except _FAULTS as error:
            raise self._failed("get", error, key) from error

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Everything under a folder; `prefix` ends at a "/"."""
        try:
            for batch in self._store.list(prefix):
                for entry in batch:
                    yield StoredObject(entry["path"], entry["size"], entry["last_modified"].timestamp())
        except _FAULTS as error:
            raise self._failed("list", error, prefix) from error

    def delete_folder(self, prefix: str) -> int:
        """Deletes everything under `prefix`; returns how many objects that were."""
        found = [entry.key for entry in self.list(prefix)]
        try:
            if found:
                self._store.delete(found)
        except FileNotFoundError:
            pass  # somebody else deleted it as well
        except _FAULTS as error:
            raise self._failed("delete", error, prefix) from error
        return len(found)

    def delete_torn(self, before: float) -> int:
        """Deletes what writers that were killed on the way have left since before Unix second `before`."""
        torn = [path for path in self.folder.rglob("*#*") if _TORN.search(path.name)] if self.folder else []
        old = [path for path in torn if path.stat().st_mtime < before]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    async def sign(self, key: str, seconds: int) -> str | None:
        """A URL that reads the object for `seconds`, without our help; None where the store cannot (`signs`)."""
        if not isinstance(self._signing, _SIGNING):
            return None
        try:
            return await obstore.sign_async(self._signing, "GET", key, timedelta(seconds=seconds))
        except _FAULTS as error:
            raise self._failed("sign", error, key) from error

    def _failed(self, operation: str, error: Exception, key: str) -> StoreError:
        failure = _translated(error, key)
        if not isinstance(failure, ObjectMissingError):
            with self._lock:
                self._errors[operation] += 1
        return failure

    def _attributes(self, content_type: str) -> Any:
        return {"Content-Type": content_type} if isinstance(self._store, _SIGNING) else None


def _open(url: str) -> Any:
    scheme, _, path = url.partition(":")
    if scheme == "file":
        folder = Path(path.removeprefix("//"))
        return LocalStore(folder.resolve(), automatic_cleanup=True, mkdir=True)
    if scheme == "memory":
        return MemoryStore()
    return from_url(url)


def _translated(error: Exception, key: str) -> StoreError:
    if isinstance(error, FileNotFoundError):
        return ObjectMissingError(f"the store has no object {key!r}")
    reason = str(error).partition("\n")[0]  # obstore's own debug output follows
    if "No space left" in reason or "quota exceeded" in reason.lower():
        return StoreFullError(
            f"the store is full: nothing was written to {key!r}; free disk space, or keep less with "
            "DARKROOM_RETENTION_SECONDS or DARKROOM_STORE_QUOTA_BYTES"
        )
    return StoreError(f"the store failed on {key!r}: {type(error).__name__}: {reason}")
