"""What `DARKROOM_REDIS_URL` may be, and what is said of anything else."""

import pytest
from pydantic import ValidationError

from contract.redis_url import SentinelUrl, parse_redis_url, without_password
from contract.settings import Settings


@pytest.mark.parametrize(
    "url",
    [
        "redis://redis",
        "redis://:p%2Fw@redis:6379/0",
        "rediss://user:pw@redis:6380/2?ssl_ca_certs=/etc/ca.pem",
        "redis://[::1]:6379/",
        "unix:///run/valkey.sock?db=1",
    ],
)
def test_urls_of_one_server_are_for_redis_py(url: str) -> None:
    assert parse_redis_url(url) is None


def test_what_a_sentinel_url_says() -> None:
    url = (
        "rediss+sentinel://painter:p%40%2F@a,b:1,[::1]:26380/darkroom/3"
        "?sentinel_username=asker&sentinel_password=a%26b&ssl_ca_certs=/etc/ca.pem"
    )
    assert parse_redis_url(url) == SentinelUrl(
        sentinels=(("a", 26379), ("b", 1), ("::1", 26380)),
        service="darkroom",
        server="redis://painter:p%40%2F@/3?ssl_ca_certs=%2Fetc%2Fca.pem",
        tls=True,
        username="asker",
        password="a&b",
    )
    assert parse_redis_url("redis+sentinel://a/darkroom") == SentinelUrl((("a", 26379),), "darkroom", "redis:///0?")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis", "begins with neither redis://"),
        ("sentinel://a:26379;sentinel://b:26379", "begins with neither"),
        ("redis://:secret/word@redis:6379/0", "port is no number.*%2F"),
        ("redis://redis:65536/0", "port is no number"),
        ("redis://redis/darkroom", "path is no database number"),
        ("redis+sentinel://a:26379", "expected redis.sentinel://.*/SERVICE"),
        ("redis+sentinel://:secret/word@a/darkroom", "expected redis.sentinel://.*%2F"),
        ("redis+sentinel://a/darkroom/zero", "expected redis.sentinel://"),
        ("redis+sentinel://a:b/darkroom", "'a:b' is no address of a Sentinel"),
        ("redis+sentinel://a:70000/darkroom", "'a:70000' is no address of a Sentinel"),
        ("redis+sentinel://a,/darkroom", "'' is no address of a Sentinel"),
    ],
)
def test_another_url_ends_the_start_and_says_what_is_expected(url: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        Settings(redis_url=url)
    assert "secret" not in str(caught.value)


def test_passwords_are_not_shown() -> None:
    url = "redis+sentinel://user:one@two@a,b/darkroom?sentinel_password=three&db=1"
    assert without_password(url) == "redis+sentinel://...@a,b/darkroom?sentinel_password=...&db=1"
