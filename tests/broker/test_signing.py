"""The signatures of the URLs that local pictures are read by, and the keys that make them."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from redis import Redis

from broker.connection import connect_async
from broker.embedded import EmbeddedValkey
from broker.gateway_side import JobBroker
from broker.signing import SignatureInvalidError, Signers, UrlExpiredError, UrlSigner
from contract import keys
from contract.settings import Settings

KEY = "outputs/a/x/0.png"
DIGEST = "0" * 64
HOUR, DAY = 3600, 86400


def works(signer: UrlSigner, signature: str) -> bool:
    try:
        signer.check(KEY, DIGEST, 1000, signature, now=0)
    except SignatureInvalidError:
        return False
    return True


def sign(signer: UrlSigner) -> str:
    return signer.sign(KEY, DIGEST, 1000)


def test_signatures_hold_for_one_key_one_content_one_expiry_and_their_time() -> None:
    signer = UrlSigner(["new", "old"])
    signature = sign(signer)
    signer.check(KEY, DIGEST, 1000, signature, now=1000)
    with pytest.raises(UrlExpiredError):
        signer.check(KEY, DIGEST, 1000, signature, now=1001)
    for key, digest, expires in (("outputs/a/x/1.png", DIGEST, 1000), (KEY, "1" * 64, 1000), (KEY, DIGEST, 2000)):
        with pytest.raises(SignatureInvalidError):
            signer.check(key, digest, expires, signature, now=0)
    assert not any(works(signer, forged) for forged in ("", "x", "ü" * 27))


def test_configured_keys_rotate() -> None:
    before = sign(UrlSigner(["old"]))
    during = UrlSigner(["new", "old"])
    assert works(during, before)
    assert sign(during) == sign(UrlSigner(["new"]))
    assert not works(UrlSigner(["new"]), before)
    with pytest.raises(ValueError, match="DARKROOM_SIGNING_KEYS"):
        UrlSigner([])


async def test_configured_keys_need_no_redis(gateway: JobBroker, settings: Settings) -> None:
    chosen = settings.model_copy(
        update={"signing_keys": (SecretStr("new"), SecretStr("old")), "redis_url": "redis://127.0.0.1:1/0"}
    )
    other = JobBroker(chosen)
    assert sign(await other.url_signer()) == sign(UrlSigner(["new"]))
    await other.close()


async def test_gateways_without_configured_keys_share_one(gateway: JobBroker, settings: Settings) -> None:
    other = JobBroker(settings)
    assert works(await other.url_signer(), sign(await gateway.url_signer()))
    await other.close()


@pytest.fixture
def age(redis_client: Redis) -> Callable[[int], None]:
    """Makes all shared keys older by so many seconds."""

    def make_older(seconds: int) -> None:
        signing: Any = redis_client.zrange(keys.signing_keys(), 0, -1)
        for key in signing:
            redis_client.zincrby(keys.signing_keys(), -seconds, key)

    return make_older


async def test_shared_keys_rotate(settings: Settings, redis_client: Redis, age: Callable[[int], None]) -> None:
    connection = connect_async(settings.redis_url)

    async def another_gateway() -> UrlSigner:
        return await Signers(connection, settings).get()

    first = await another_gateway()
    age(DAY - 60)
    assert sign(await another_gateway()) == sign(first)
    age(120)
    becoming_known = await another_gateway()
    assert sign(becoming_known) == sign(first), "a gateway that has not read the new key would refuse its URLs"
    assert redis_client.zcard(keys.signing_keys()) == 2
    age(600)
    rotated = await another_gateway()
    assert sign(rotated) != sign(first)
    assert works(becoming_known, sign(rotated))
    assert works(rotated, sign(first))
    age(HOUR + 60)
    later = await another_gateway()
    assert not works(later, sign(first))
    assert sign(later) == sign(rotated)
    assert redis_client.zcard(keys.signing_keys()) == 1
    await connection.aclose()


async def test_a_gateway_reads_the_shared_keys_again_and_bears_that_redis_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.signing._READ_AGAIN_SECONDS", 0.0)
    server = EmbeddedValkey()
    server.start()
    with Redis.from_url(server.url) as client:
        connection = connect_async(server.url)
        signers = Signers(connection, Settings(redis_url=server.url))
        before = sign(await signers.get())
        for key in client.zrange(keys.signing_keys(), 0, -1):
            client.zincrby(keys.signing_keys(), -2 * DAY, key)
        await signers.get()  # makes another
        for key in client.zrange(keys.signing_keys(), 0, -1):
            client.zincrby(keys.signing_keys(), -600, key)
        after = sign(await signers.get())
        assert after != before
    server.stop()
    assert sign(await signers.get()) == after
    await connection.aclose()


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected at least 16 characters"):
        Settings(signing_keys=(SecretStr("long enough to sign"), SecretStr("short")))
