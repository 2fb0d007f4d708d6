"""Opens the client of a picture store: which one a URL names, its endpoints, and how long it waits for answers."""

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store, from_url

from broker.store_errors import FAULTS, StoreRefusedError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

Client = S3Store | GCSStore | AzureStore | LocalStore | MemoryStore
CloudClient = S3Store | GCSStore | AzureStore
CLOUD: Final = (S3Store, GCSStore, AzureStore)

_ENDPOINTS: Final = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    *("GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
)
_CONNECT_SECONDS: Final = 5.0
_RETRIES: Final = 2
_BUCKET: Final = "{bucket}"


def open_client(url: str, timeout: float) -> Client:
    """file:PATH (made if missing), memory:, s3://, gs:// or az://. Plain HTTP is spoken where an endpoint of the
    environment says http. Raises `StoreRefusedError` where no store can be made of it.

    `timeout`: seconds without a byte after which a request counts as failed. A whole call ends within about five times
    as long (three for one request that keeps trickling, one in which tries may be repeated), and within two where the
    store is silent.
    """
    scheme, _, path = url.partition(":")
    try:
        if scheme == "file":
            folder = Path(path.removeprefix("//"))
            return LocalStore(folder.resolve(), automatic_cleanup=True, mkdir=True)
        if scheme == "memory":
            return MemoryStore()
        opened = from_url(url, **_patience(timeout))
    except FAULTS as error:
        reason = str(error).partition("\n")[0]  # obstore's debug output follows
        raise StoreRefusedError(f"DARKROOM_STORE_URL names no store that can be opened: {url!r}: {reason}") from error
    if not isinstance(opened, CLOUD):
        raise StoreRefusedError(
            f"DARKROOM_STORE_URL is {url!r}; expected file:PATH, memory:, s3://bucket, gs://bucket or az://container"
        )
    return opened


def open_public(url: str, client: CloudClient, endpoint: str, timeout: float) -> CloudClient:
    """For signing only, which may ask for credentials first: the same place as clients of ours reach it. `{bucket}` in
    an S3 endpoint's host stands for the bucket (virtual hosted style); without it the bucket is the first part of the
    path."""
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
        raise StoreRefusedError(
            f"DARKROOM_STORE_PUBLIC_ENDPOINT is {endpoint!r}; expected a URL like https://pictures.example"
        )
    endpoint = endpoint.rstrip("/")
    config: dict[str, Any]
    if isinstance(client, S3Store):
        config = {
            "endpoint": endpoint.replace(_BUCKET, str(client.config["bucket"])),
            "virtual_hosted_style_request": _BUCKET in endpoint,
        }
    else:
        config = {"base_url" if isinstance(client, GCSStore) else "endpoint": endpoint}
    public = from_url(url, config=config, **_patience(timeout))  # type: ignore[call-overload]
    assert isinstance(public, CLOUD)
    return public


def _patience(timeout: float) -> Any:
    """Also of whoever gives us credentials."""
    return {"client_options": _client_options(timeout), "retry_config": _retry_config(timeout)}


def _client_options(timeout: float) -> "ClientConfig":
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=min(timeout, _CONNECT_SECONDS)),
        "read_timeout": timedelta(seconds=timeout),
        "timeout": timedelta(seconds=3 * timeout),
    }
    if any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS):
        options["allow_http"] = True
    return options


def _retry_config(timeout: float) -> "RetryConfig":
    """Few: whoever waits for an answer has a client of its own, and workers try again by themselves for long."""
    return {
        "max_retries": _RETRIES,
        "retry_timeout": timedelta(seconds=timeout),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
    }
