"""Pictures of a local store: whole, in parts, not again, and only with a signature."""

import time
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import httpx
import pytest

from broker.gateway_side import JobBroker
from contract.settings import Settings
from service.ranges import RangeNotSatisfiableError, etag_matches, parse_range

KEY = "outputs/job/execution/0.webp"
DATA = bytes(range(256)) * 3000  # more than one chunk


@pytest.fixture
async def broker(settings: Settings) -> AsyncIterator[JobBroker]:
    broker = JobBroker(settings)
    await broker.store.put_async(KEY, DATA, "image/webp")
    yield broker
    await broker.close()


async def signed(broker: JobBroker, key: str = KEY, seconds: int = 600) -> str:
    digest, expires = sha256(DATA).hexdigest(), int(time.time()) + seconds
    signature = (await broker.url_signer()).sign(key, digest, expires)
    return f"/v1/images/{key}?sha256={digest}&expires={expires}&signature={signature}"


@pytest.fixture
async def url(broker: JobBroker) -> str:
    return await signed(broker)


@pytest.fixture
async def http(settings: Settings, serving: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(settings) as address, httpx.AsyncClient(base_url=address) as client:
        yield client


async def test_a_picture_and_what_caches_need(http: httpx.AsyncClient, url: str) -> None:
    answer = await http.get(url)
    assert (answer.status_code, answer.content) == (200, DATA)
    expected = {
        "content-type": "image/webp",
        "content-length": str(len(DATA)),
        "content-disposition": 'inline; filename="job-0.webp"',
        "etag": f'"{sha256(DATA).hexdigest()}"',
        "accept-ranges": "bytes",
        "x-content-type-options": "nosniff",
    }
    assert {name: answer.headers[name] for name in expected} == expected
    private, age, immutable = answer.headers["cache-control"].split(", ")
    assert (private, immutable) == ("private", "immutable")
    assert 0 < int(age.removeprefix("max-age=")) <= 600
    head = await http.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert {name: head.headers[name] for name in expected} == expected


async def test_a_known_picture_is_not_sent_again(http: httpx.AsyncClient, url: str, broker: JobBroker) -> None:
    etag = (await http.head(url)).headers["etag"]
    for known in (etag, f'"x", W/{etag}', "*"):
        for method in ("GET", "HEAD"):
            answer = await http.request(method, url, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
            assert "max-age" in answer.headers["cache-control"]
    assert (await http.get(url, headers={"If-None-Match": '"other"'})).status_code == 200
    broker.store.delete_folder("outputs/job/")
    assert (await http.get(url, headers={"If-None-Match": etag})).status_code == 404


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=300000-600000", 300_000, 600_001),
        ("Bytes= 10-", 10, len(DATA)),
        ("bytes=-5", len(DATA) - 5, len(DATA)),
        ("bytes=-99999999", 0, len(DATA)),
        ("bytes=5-99999999999999999999999999", 5, len(DATA)),
    ],
)
async def test_one_range(http: httpx.AsyncClient, url: str, asked: str, start: int, end: int) -> None:
    answer = await http.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, DATA[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert answer.headers["content-length"] == str(end - start)


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "bytes=5-4", "bytes=-", "bytes=a-b", "pixels=0-1", "bytes=٣-٤"])
async def test_what_is_no_single_range_gets_the_whole_file(http: httpx.AsyncClient, url: str, asked: str) -> None:
    answer = await http.get(url, headers=[(b"Range", asked.encode())])
    assert (answer.status_code, len(answer.content)) == (200, len(DATA))


@pytest.mark.parametrize("asked", [f"bytes={len(DATA)}-", "bytes=-0", f"bytes={10**30}-{10**30}"])
async def test_a_range_behind_the_end(http: httpx.AsyncClient, url: str, asked: str) -> None:
    answer = await http.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


async def test_a_range_of_another_file_gets_the_whole_one(http: httpx.AsyncClient, url: str) -> None:
    etag = (await http.head(url)).headers["etag"]
    for given, status in ((etag, 206), ('"other"', 200), ("Sat, 21 Nov 2026 08:00:00 GMT", 200)):
        answer = await http.get(url, headers={"Range": "bytes=0-1", "If-Range": given})
        assert answer.status_code == status
    assert (await http.head(url, headers={"Range": "bytes=0-1"})).status_code == 200


async def test_no_signature_no_file(http: httpx.AsyncClient, url: str, broker: JobBroker) -> None:
    for name, value in (("sha256", "0" * 64), ("expires", "9999999999"), ("signature", "x")):
        for method in ("GET", "HEAD"):
            answer = await http.request(method, httpx.URL(url).copy_set_param(name, value))
            assert answer.status_code == 403
    assert broker.store.folder is not None
    (broker.store.folder / "outside.png").write_bytes(b"x")
    for key in ("outside.png", "outputs/%2e%2e/outside.png", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "outputs/%00"):
        answer = await http.get(url.replace(KEY, key))
        assert (answer.status_code, answer.json()["code"]) == (403, "url_invalid"), key


async def test_an_expired_url(http: httpx.AsyncClient, broker: JobBroker) -> None:
    answer = await http.get(await signed(broker, seconds=-1))
    assert (answer.status_code, answer.json()["code"]) == (403, "url_expired")
    assert answer.headers["cache-control"] == "no-store"


def test_header_values_of_any_length() -> None:
    assert parse_range(f"bytes={'9' * 100_000}-", 5) is None
    with pytest.raises(RangeNotSatisfiableError):
        parse_range("bytes=-0", 0)
    assert parse_range(None, 5) is None
    assert not etag_matches(None, '"x"')
    assert not etag_matches("", '"x"')
