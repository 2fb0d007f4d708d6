"""The store over a real HTTP Azure Blob API: Microsoft's own emulator, Azurite."""

import asyncio
import base64
import hmac
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final

import httpx
import pytest

from broker.embedded import free_port
from broker.store import ObjectMissingError, Store, StoreRefusedError

AZURITE: Final = shutil.which("azurite-blob")
pytestmark = pytest.mark.skipif(AZURITE is None, reason="no azurite-blob; run: npm install --global azurite")
ACCOUNT: Final = "devstoreaccount1"
SECRET: Final = base64.b64encode(b"of the tests alone" * 3).decode()
URL: Final = "az://pictures/some/where"
KEY: Final = "outputs/a/x/0.png"


def make_container(endpoint: str) -> None:
    """PUT, signed with the account's key ("Authorize with Shared Key" in the reference of Azure Storage)."""
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    resource = f"/{ACCOUNT}/{ACCOUNT}/pictures\nrestype:container"
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-12-02\n{resource}"
    signature = base64.b64encode(hmac.digest(base64.b64decode(SECRET), signed.encode(), sha256)).decode()
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-12-02",
        "Authorization": f"SharedKey {ACCOUNT}:{signature}",
    }
    httpx.put(f"{endpoint}/pictures?restype=container", headers=headers).raise_for_status()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("azurite") / "log"
    assert AZURITE is not None
    with log.open("wb") as out, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AZURITE_ACCOUNTS", f"{ACCOUNT}:{SECRET}")
        process = subprocess.Popen(
            [AZURITE, "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck"],
            cwd=log.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        answers = False
        while not answers:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
            try:
                answers = httpx.get(f"http://127.0.0.1:{port}/").status_code > 0
            except httpx.TransportError:
                continue
        make_container(f"http://127.0.0.1:{port}/{ACCOUNT}")
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(autouse=True)
def account(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", SECRET)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)


async def test_bytes_go_in_and_come_out() -> None:
    store = Store(URL)
    assert store.check() is None
    data = bytes(range(256)) * 40_000
    store.put(KEY, data, "image/png")
    await store.put_async(KEY, data, "image/png")
    assert store.get(KEY) == await store.get_async(KEY) == data
    assert await store.size_async(KEY) == len(data)
    assert b"".join([chunk async for chunk in await store.stream_async(KEY, 7, 600_000)]) == data[7:600_000]
    store.put("outputs/b/x/0.png", b"another job's", "image/png")
    assert [entry.key for entry in store.list("outputs/a/")] == [KEY]
    assert store.delete_folder("outputs/a/") == 1
    with pytest.raises(ObjectMissingError):
        store.get(KEY)
    assert store.get("outputs/b/x/0.png") == b"another job's"


async def test_signed_urls_read_one_object_and_expire() -> None:
    store = Store(URL)
    store.put(KEY, b"a picture", "image/png")
    store.put("outputs/b/x/0.png", b"another", "image/png")
    url = await store.sign(KEY, 600)
    assert url is not None
    async with httpx.AsyncClient() as http:
        answer = await http.get(url)
        assert (answer.status_code, answer.content) == (200, b"a picture")
        assert answer.headers["content-type"] == "image/png"
        part = await http.get(url, headers={"Range": "bytes=2-4"})
        assert (part.status_code, part.content) == (206, b"pic")
        assert (await http.put(url, content=b"x", headers={"x-ms-blob-type": "BlockBlob"})).status_code == 403
        assert (await http.get(url.replace("outputs/a/", "outputs/b/"))).status_code == 403
        short = await store.sign(KEY, 1)
        assert short is not None
        status = 200
        while status == 200:
            await asyncio.sleep(0.2)
            status = (await http.get(short)).status_code
        assert status == 403


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreRefusedError, match="no such bucket"):
        Store("az://nowhere").check()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"another").decode())
    with pytest.raises(StoreRefusedError, match="credentials"):
        Store(URL).check()
