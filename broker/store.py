"""The picture store: one API over a local folder, memory and the cloud stores."""

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

import obstore
from obstore.store import LocalStore

from broker.store_client import CLOUD, open_client, open_public
from broker.store_errors import (
    FAULTS,
    ObjectMissingError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    translated,
)
from contract import keys
from contract.settings import Settings

__all__ = ["ObjectMissingError", "Store", "StoreError", "StoreFullError", "StoreRefusedError", "StoredObject"]

_TORN: Final = re.compile(r"#\d+$")  # obstore writes KEY#NUMBER and renames it
_CHECKED: Final = b"Darkroom can write here."
_CHUNK_BYTES: Final = 256 * 2**10
_DELETE_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class StoredObject:
    """`size` in bytes, `modified` in Unix seconds by the store's clock."""

    key: str
    size: int
    modified: float


class Store:
    """Opens what `url` names: file:PATH (made if missing), memory:, s3://, gs:// or az://.

    `public_endpoint` replaces the endpoint in signed URLs, and `timeout` bounds every call (`store_client`).
    Credentials come from the environment, as each cloud's own tools read them. Methods raise `StoreError`; thread-safe.
    """

    folder: Path | None
    """Where a local store keeps its objects; None for the others."""

    def __init__(self, url: str, public_endpoint: str | None = None, timeout: float = 10.0) -> None:
        self._store = open_client(url, timeout)
        self._errors = dict.fromkeys(("put", "get", "list", "delete", "sign"), 0)
        self._lock = threading.Lock()
        self.folder = self._store.prefix if isinstance(self._store, LocalStore) else None
        self._signing = self._store
        if public_endpoint is not None and isinstance(self._store, CLOUD):
            self._signing = open_public(url, self._store, public_endpoint, timeout)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.store_url, settings.store_public_endpoint, settings.store_timeout_seconds)

    @property
    def errors(self) -> Mapping[str, int]:
        """How many calls have raised `StoreError` so far, by operation; that an object is missing is no error."""
        return self._errors

    @property
    def signs(self) -> bool:
        """Whether `sign` gives URLs; otherwise the gateway serves the pictures itself."""
        return isinstance(self._signing, CLOUD)

    def check(self) -> StoreError | None:
        """Writes, reads, lists and deletes a small object. Returns what went wrong where waiting may help, and raises
        `StoreRefusedError` where somebody has to correct something."""
        folder = f"checks/{uuid4().hex}/"
        try:
            self.put(f"{folder}probe", _CHECKED, "text/plain")
            if self.get(f"{folder}probe") != _CHECKED or self.delete_folder(folder) != 1:
                raise StoreRefusedError("the store does not give back what was written; expected one that does at once")
        except StoreRefusedError:
            raise
        except StoreError as error:
            return error
        return None

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Whole or not at all, a crash of the machine included; replaces what was there."""
        try:
            self._store.put(key, data, attributes=self._attributes(key, content_type), use_multipart=False)
            if self.folder is not None:
                _sync(self.folder / key)
        except FAULTS as error:
            raise self._failed("put", error, key) from error

    async def put_async(self, key: str, data: bytes, content_type: str) -> None:
        """The same."""
        if self.folder is not None:
            return await asyncio.to_thread(self.put, key, data, content_type)
        try:
            attributes = self._attributes(key, content_type)
            await self._store.put_async(key, data, attributes=attributes, use_multipart=False)
        except FAULTS as error:
            raise self._failed("put", error, key) from error

    def get(self, key: str) -> bytes:
        """Raises `ObjectMissingError`."""
        try:
            return bytes(self._store.get(key).bytes())
        except FAULTS as error:
            raise self._failed("get", error, key) from error

    async def get_async(self, key: str) -> bytes:
        try:
            return bytes(await (await self._store.get_async(key)).bytes_async())
        except FAULTS as error:
            raise self._failed("get", error, key) from error

    async def size_async(self, key: str) -> int:
        """In bytes. Raises `ObjectMissingError`."""
        try:
            return (await self._store.head_async(key))["size"]
        except FAULTS as error:
            raise self._failed("get", error, key) from error

    async def stream_async(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` up to but not including `end`, in chunks. Opened before this returns, so that an error comes
        here and not half-way. Raises `ObjectMissingError`."""
        try:
            opened = await self._store.get_async(key, options={"range": (start, end)})
        except FAULTS as error:
            raise self._failed("get", error, key) from error

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in opened.stream(_CHUNK_BYTES):
                    yield bytes(chunk)
            except FAULTS as error:
                raise self._failed("get", error, key) from error

        return chunks()

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Everything under a folder; `prefix` ends at a "/". Read page by page."""
        try:
            for batch in self._store.list(prefix):
                for entry in batch:
                    yield StoredObject(entry["path"], entry["size"], entry["last_modified"].timestamp())
        except FAULTS as error:
            raise self._failed("list", error, prefix) from error

    def delete_folder(self, prefix: str) -> int:
        """Deletes everything under `prefix`, up to 1000 objects per request where the store can; returns how many
        objects that were."""
        for _ in range(_DELETE_TRIES):
            found = [entry.key for entry in self.list(prefix)]
            try:
                if found:
                    self._store.delete(found)
                return len(found)
            except FileNotFoundError:
                continue  # somebody else deletes here as well: what is left?
            except FAULTS as error:
                raise self._failed("delete", error, prefix) from error
        return 0

    def delete_torn(self, before: float) -> int:
        """Deletes what writers that were killed on the way have left since before Unix second `before`."""
        found = 0
        for folder, _, names in os.walk(self.folder) if self.folder else ():
            for path in (Path(folder, name) for name in names if _TORN.search(name)):
                try:
                    if path.stat().st_mtime < before:
                        path.unlink()
                        found += 1
                except FileNotFoundError:
                    continue  # its writer lives, and has given it its name
                except OSError as error:
                    raise self._failed("delete", error, str(path)) from error
        return found

    async def sign(self, key: str, seconds: int) -> str | None:
        """A URL that reads the object for `seconds`, without our help; None where the store cannot (`signs`)."""
        if not isinstance(self._signing, CLOUD):
            return None
        try:
            return await obstore.sign_async(self._signing, "GET", key, timedelta(seconds=seconds))
        except FAULTS as error:
            raise self._failed("sign", error, key) from error

    def _failed(self, operation: str, error: Exception, key: str) -> StoreError:
        failure = translated(error, key, reading=operation == "get")
        if not isinstance(failure, ObjectMissingError):
            with self._lock:
                self._errors[operation] += 1
        return failure

    def _attributes(self, key: str, content_type: str) -> Any:
        """What the cloud stores answer with; a local store keeps bytes alone."""
        if not isinstance(self._store, CLOUD):
            return None
        name = keys.file_name(key)
        return {"Content-Type": content_type} | (
            {"Content-Disposition": f'inline; filename="{name}"'} if name is not None else {}
        )


def _sync(path: Path) -> None:
    """Onto the disk: after a power failure a file that was merely renamed may be there and empty."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as written:  # deleted since then
        try:
            os.fsync(written.fileno())
        except OSError:
            path.unlink()  # who knows what it holds
            raise
