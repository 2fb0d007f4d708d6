"""The picture store and the URLs it is read by."""

from pathlib import Path

import pytest

from broker.gateway_side import JobBroker
from broker.signing import SignatureInvalidError, UrlExpiredError, UrlSigner
from broker.store import ObjectMissingError, Store, StoreError
from contract.settings import Settings


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(f"file:{tmp_path / 'made' / 'for us'}" if request.param == "file" else "memory:")


async def test_put_get_list_delete(store: Store) -> None:
    store.put("outputs/a/x/0.png", b"one", "image/png")
    await store.put_async("outputs/a/x/1.png", b"two", "image/png")
    await store.put_async("outputs/ab/x/0.png", b"other", "image/png")
    store.put("outputs/a/x/0.png", b"once more", "image/png")
    assert store.get("outputs/a/x/0.png") == b"once more"
    assert await store.get_async("outputs/a/x/1.png") == b"two"
    assert sorted((entry.key, entry.size) for entry in store.list("outputs/a/")) == [
        ("outputs/a/x/0.png", 9),
        ("outputs/a/x/1.png", 3),
    ]
    assert store.delete_folder("outputs/a/") == 2
    assert store.delete_folder("outputs/a/") == 0
    with pytest.raises(ObjectMissingError, match=r"outputs/a/x/0\.png"):
        store.get("outputs/a/x/0.png")
    with pytest.raises(ObjectMissingError):
        await store.get_async("outputs/a/x/0.png")
    assert store.get("outputs/ab/x/0.png") == b"other"
    assert not store.signs
    assert await store.sign("outputs/ab/x/0.png", 60) is None


@pytest.mark.parametrize("key", ["../outside", "outputs/../../outside", "/etc/passwd", "outputs//x", ""])
def test_no_key_leaves_the_folder(tmp_path: Path, key: str) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    store = Store(f"file:{tmp_path / 'store'}")
    with pytest.raises(StoreError):
        store.get(key)


def test_an_unwritable_store_is_one_clear_error(tmp_path: Path) -> None:
    store = Store(f"file:{tmp_path / 'store'}")
    (tmp_path / "store" / "outputs").write_bytes(b"a file where a folder should be")
    with pytest.raises(StoreError, match=r"the store failed on 'outputs/a/0\.png'"):
        store.put("outputs/a/0.png", b"x", "image/png")


async def test_cloud_stores_sign_for_the_public_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    store = Store("s3://bucket/prefix", "https://pictures.example")
    assert store.signs
    url = await store.sign("outputs/a/0.png", 60)
    assert url is not None
    assert url.startswith("https://pictures.example/bucket/prefix/outputs/a/0.png?")
    assert "X-Amz-Expires=60" in url


def test_signatures_hold_for_one_key_one_expiry_and_their_time() -> None:
    signer = UrlSigner(["new", "old"])
    signature = signer.sign("outputs/a/0.png", 1000)
    signer.check("outputs/a/0.png", 1000, signature, now=1000)
    with pytest.raises(UrlExpiredError):
        signer.check("outputs/a/0.png", 1000, signature, now=1001)
    for key, expires in (("outputs/a/1.png", 1000), ("outputs/a/0.png", 2000)):
        with pytest.raises(SignatureInvalidError):
            signer.check(key, expires, signature, now=0)
    for forged in ("", "x", "ü" * 27):
        with pytest.raises(SignatureInvalidError):
            signer.check("outputs/a/0.png", 1000, forged, now=0)


def test_signing_keys_rotate() -> None:
    before = UrlSigner(["old"]).sign("k", 10)
    during = UrlSigner(["new", "old"])
    during.check("k", 10, before, now=0)
    assert during.sign("k", 10) == UrlSigner(["new"]).sign("k", 10)
    with pytest.raises(SignatureInvalidError):
        UrlSigner(["new"]).check("k", 10, before, now=0)
    with pytest.raises(ValueError, match="DARKROOM_SIGNING_KEYS"):
        UrlSigner([])


async def test_gateways_without_configured_keys_share_one(gateway: JobBroker, settings: Settings) -> None:
    other = JobBroker(settings)
    signature = (await gateway.url_signer()).sign("k", 10)
    (await other.url_signer()).check("k", 10, signature, now=0)
    await other.close()
