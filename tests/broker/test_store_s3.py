"""The store over a real HTTP S3 API: what comes out, who may, and what happens while the server is slow or gone."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.auth
import httpx
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from redis import Redis

from broker.gateway_side import JobBroker
from broker.store import ObjectMissingError, Store, StoreError, StoreFullError, StoreRefusedError
from broker.take import TakenJob
from broker.worker_side import WorkerBroker
from contract import keys
from contract.settings import Settings
from contract.spec import JobResult, JobSpec
from tests.s3_server import BUCKET, Relay, S3Server, environment

URL = f"s3://{BUCKET}/some/where"
KEY = "outputs/a/x/0.png"
ROOT = Path(__file__).resolve().parents[2]
DAY = 86400


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server() as server:
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def relay(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    with Relay(s3.url) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        yield relay


async def test_bytes_and_content_types_are_kept(s3: S3Server) -> None:
    store = Store(URL)
    data = bytes(range(256)) * 40_000  # larger than a part of an upload in parts
    for key, content_type in ((KEY, "image/png"), ("outputs/a/x/1.webp", "image/webp")):
        store.put(key, data, content_type)
        await store.put_async(key, data, content_type)
        assert store.get(key) == await store.get_async(key) == data
        assert await store.size_async(key) == len(data)
        assert b"".join([chunk async for chunk in await store.stream_async(key, 7, 600_000)]) == data[7:600_000]
        kept = s3.client().head_object(Bucket=BUCKET, Key=f"some/where/{key}")
        assert kept["ContentType"] == content_type
        assert kept["ContentDisposition"] == f'inline; filename="a-{key[-6:].strip("x/")}"'
    for missing in (store.size_async("outputs/b"), store.get_async("outputs/b"), store.stream_async("outputs/b", 0, 1)):
        with pytest.raises(ObjectMissingError):
            await missing


async def test_listing_and_deletion_go_page_by_page(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    store = Store(URL)
    await asyncio.gather(*(store.put_async(f"inputs/a/{i}.png", b"x", "image/png") for i in range(35)))
    await store.put_async("inputs/ab/0.png", b"other", "image/png")
    assert len(s3.client().list_objects_v2(Bucket=BUCKET)["Contents"]) == 10
    assert len({entry.key for entry in store.list("inputs/a/")}) == 35
    assert store.delete_folder("inputs/a/") == 35
    assert store.delete_folder("inputs/a/") == 0
    assert [(entry.key, entry.size) for entry in store.list("inputs/")] == [("inputs/ab/0.png", 5)]


async def test_a_signed_url_needs_nothing_but_http(s3: S3Server) -> None:
    store = Store(URL, f"http://localhost:{s3.port}/")
    store.put(KEY, b"picture", "image/png")
    url = await store.sign(KEY, 60)
    assert url is not None
    assert url.startswith(f"http://localhost:{s3.port}/{BUCKET}/some/where/{KEY}?")
    answer = await asyncio.to_thread(httpx.get, url)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"picture", "image/png")
    part = await asyncio.to_thread(httpx.get, url, headers={"Range": "bytes=1-3"})
    assert part.content == b"ict"


@pytest.mark.parametrize(
    ("endpoint", "begins"),
    [
        (None, f"http://127.0.0.1:8333/{BUCKET}/some/where/"),
        ("https://s3.example", f"https://s3.example/{BUCKET}/some/where/"),
        ("http://s3.example:8333", f"http://s3.example:8333/{BUCKET}/some/where/"),
        ("https://{bucket}.s3.example", f"https://{BUCKET}.s3.example/some/where/"),
        ("https://proxy.example/s3/", f"https://proxy.example/s3/{BUCKET}/some/where/"),
    ],
)
async def test_urls_are_signed_as_boto_signs_them(
    monkeypatch: pytest.MonkeyPatch, endpoint: str | None, begins: str
) -> None:
    for name, value in environment("http://127.0.0.1:8333").items():
        monkeypatch.setenv(name, value)
    store = Store(URL, endpoint)
    assert store.signs
    url = httpx.URL(await store.sign("outputs/a/x/with space.png", 60) or "")
    assert str(url).startswith(begins)
    assert url.params["X-Amz-Expires"] == "60"
    then = datetime.strptime(url.params["X-Amz-Date"], "%Y%m%dT%H%M%SZ")  # noqa: DTZ007
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: then)
    request = AWSRequest("GET", str(url.copy_with(query=None)))
    credentials = Credentials("an-id", "not-a-secret")
    botocore.auth.S3SigV4QueryAuth(credentials, "s3", "eu-west-1", 60).add_auth(request)
    assert httpx.URL(request.url).params["X-Amz-Signature"] == url.params["X-Amz-Signature"]


async def test_azure_signs_for_the_public_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "bm90LWEtc2VjcmV0")
    store = Store("az://container/pre", "https://pictures.example")
    url = await store.sign(KEY, 60)
    assert url is not None
    assert url.startswith(f"https://pictures.example/container/pre/{KEY}?")
    assert "sig=" in url


async def test_google_signs_for_the_public_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"private_key": key.decode(), "private_key_id": "1", "client_email": "darkroom@example.com"}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    for endpoint in (None, "https://pictures.example"):
        url = await Store("gs://bucket/pre", endpoint).sign(KEY, 60)
        assert url is not None
        assert url.startswith(f"{endpoint or 'https://storage.googleapis.com'}/bucket/pre/{KEY}?")
        assert "X-Goog-Signature=" in url


def test_a_public_endpoint_is_a_url(s3: S3Server) -> None:
    with pytest.raises(StoreRefusedError, match=r"DARKROOM_STORE_PUBLIC_ENDPOINT is 'pictures\.example'"):
        Store(URL, "pictures.example")


def test_the_check_says_what_is_wrong(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreRefusedError, match=r"no such bucket .*create it, or correct DARKROOM_STORE_URL"):
        Store("s3://other").check()
    with pytest.raises(StoreRefusedError, match="no such bucket"):
        Store("s3://other").get(KEY)
    right = s3.make_key()
    with pytest.raises(StoreRefusedError, match=r"InvalidAccessKeyId.*expected credentials"):
        Store(URL).check()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", right["AWS_ACCESS_KEY_ID"])
    with pytest.raises(StoreRefusedError, match="SignatureDoesNotMatch"):
        Store(URL).check()
    with pytest.raises(StoreRefusedError, match="SignatureDoesNotMatch"):
        list(Store(URL).list("outputs/"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", right["AWS_SECRET_ACCESS_KEY"])
    store = Store(URL)
    assert store.check() is None
    assert list(store.list("checks/")) == []
    for name in right:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreRefusedError, match="no credentials for the store were found in the environment"):
        Store(URL).check()


class _Full(BaseHTTPRequestHandler):
    answer = (0, "")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, code = self.answer
        body = f"<Error><Code>{code}</Code><Message>told</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("answer", [(403, "QuotaExceeded"), (507, "XMinioStorageFull")])
def test_a_full_bucket_is_named_and_ends_no_start(monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str]) -> None:
    """As Ceph and MinIO say it."""
    monkeypatch.setattr(_Full, "answer", answer)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Full) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        for name, value in environment(f"http://127.0.0.1:{server.server_port}").items():
            monkeypatch.setenv(name, value)
        assert isinstance(Store(URL).check(), StoreFullError)
        server.shutdown()
        thread.join()


async def test_credentials_are_not_waited_for_longer_than_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A role's come over HTTP, here from a service that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in environment("http://127.0.0.1:1").items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = Store(URL, "https://pictures.example", timeout=0.2)
        async with asyncio.timeout(60):
            with pytest.raises(StoreError, match="no credentials"):
                await store.sign(KEY, 60)


def test_an_outage_passes(s3: S3Server) -> None:
    store = Store(URL)
    store.put(KEY, b"before", "image/png")
    s3.stop()
    for call in (
        lambda: store.put(KEY, b"after", "image/png"),
        lambda: store.get(KEY),
        lambda: list(store.list("outputs/")),
    ):
        with pytest.raises(StoreError, match="the store failed on") as caught:
            call()
        assert not isinstance(caught.value, StoreRefusedError | ObjectMissingError)
    assert "the store failed on 'checks/" in str(store.check())
    assert store.errors["get"] == 1
    s3.start()
    assert store.check() is None
    assert store.get(KEY) == b"before"


async def test_a_silent_or_trickling_store_has_failed(s3: S3Server, relay: Relay) -> None:
    store = Store(URL, timeout=0.3)
    store.put(KEY, b"x" * 1000, "image/png")
    relay.hold()
    with pytest.raises(StoreError):
        store.put(KEY, b"y" * 1000, "image/png")
    with pytest.raises(StoreError):
        await store.get_async(KEY)
    relay.release()
    relay.trickle(0.1)  # never silent, never done
    with pytest.raises(StoreError):
        store.get(KEY)
    relay.trickle(0)
    assert store.get(KEY) == b"y" * 1000, "what was sent has arrived; its answer had not"


def test_a_slow_answer_within_the_time_is_an_answer(s3: S3Server, relay: Relay) -> None:
    store = Store(URL, timeout=30.0)
    relay.hold()
    timer = threading.Timer(0.5, relay.release)
    timer.start()
    store.put(KEY, b"late", "image/png")
    timer.join()
    assert store.get(KEY) == b"late"
    assert store.errors["put"] == 0


async def test_the_janitor_cleans_a_bucket(
    s3: S3Server,
    settings: Settings,
    worker: WorkerBroker,
    make_spec: Callable[..., JobSpec],
    result_of: Callable[[TakenJob], JobResult],
    redis_client: Redis,
) -> None:
    changes = {"store_url": URL, "retention_seconds": 1, "inputs_retention_seconds": 0}
    gateway = JobBroker(settings.model_copy(update=changes))
    spec = make_spec(n=2)
    inputs = keys.input_object(spec.id, "image")
    await gateway.store.put_async(inputs, b"png", "image/png")
    await gateway.submit(spec)
    (job,) = worker.take(1)
    for picture in result_of(job).pictures:
        gateway.store.put(picture.key, b"png", picture.content_type)
    assert worker.succeed(job, result_of(job))
    for set_of_jobs in (keys.ended(), keys.inputs_due()):
        redis_client.zincrby(set_of_jobs, -DAY, spec.id)
    cleaned = await gateway.clean()
    assert (cleaned.jobs, cleaned.inputs) == (1, 1)
    assert list(gateway.store.list("")) == []
    await gateway.close()


def test_the_lifecycle_rules_are_valid_and_outlast_the_retention(s3: S3Server) -> None:
    rules = json.loads((ROOT / "deploy/store/s3-lifecycle.json").read_text())
    client = s3.client()
    client.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=rules)
    applied = client.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    days = {rule["Filter"]["Prefix"]: rule["Expiration"]["Days"] for rule in applied if rule["Status"] == "Enabled"}
    assert_outlast(days)


def test_the_rules_for_google_say_the_same() -> None:
    rules = json.loads((ROOT / "deploy/store/gcs-lifecycle.json").read_text())["lifecycle"]["rule"]
    assert all(rule["action"] == {"type": "Delete"} for rule in rules)
    days = {prefix: rule["condition"]["age"] for rule in rules for prefix in rule["condition"]["matchesPrefix"]}
    assert_outlast(days)


def assert_outlast(days: dict[str, Any]) -> None:
    """A picture is older than its job's end, and the job that it was made from may have waited its whole deadline."""
    settings = Settings()
    assert set(days) == {"outputs/", "inputs/", "checks/"}
    assert (days["outputs/"] - 1) * DAY >= settings.retention_seconds
    assert (days["inputs/"] - 1) * DAY >= settings.queue_deadline_seconds + settings.inputs_retention_seconds
