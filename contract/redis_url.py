"""The forms of `DARKROOM_REDIS_URL`: redis-py's own, and one that names Sentinels, which redis-py has no URL for.

    redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/SERVICE[/DB][?sentinel_password=...&OPTION=...]

User, password and options are for the servers, as in redis-py's URLs; `rediss+sentinel` speaks TLS to servers and
Sentinels. Other programs read the same form (Prefect, LangChain, RedisVL).
"""

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

_SENTINEL_PORT: Final = 26379
_ENCODE: Final = "write / ? # and @ in a password as %2F %3F %23 and %40"
_SENTINEL_URL: Final = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?:(?P<user>[^/?#]*)@)?(?P<hosts>[^/?#@]+)"
    r"/(?P<service>[^/?#]+)(?:/(?P<db>\d+))?(?:\?(?P<query>[^#]*))?"
)
_HOST: Final = re.compile(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<name>[^\[\]:\s]+))(?::(?P<port>\d{1,5}))?")

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """`server` is redis-py's URL of the primary, without TLS and without its address, which the Sentinels tell."""

    sentinels: tuple[Address, ...]
    service: str
    server: str = field(repr=False)
    tls: bool = False
    """To servers and Sentinels."""
    username: str | None = None
    """Of the Sentinels, as is the password."""
    password: str | None = field(default=None, repr=False)


def parse_redis_url(url: str) -> SentinelUrl | None:
    """None: for redis-py to read. Raises ValueError, whose text leaves out what may be part of a password."""
    if "+sentinel:" not in url.partition("//")[0]:
        _check_plain(url)
        return None
    if (found := _SENTINEL_URL.fullmatch(url)) is None:
        raise ValueError(
            "the Sentinel URL cannot be read; expected "
            f"redis+sentinel://[USER:PASSWORD@]HOST[:PORT],HOST[:PORT]/SERVICE[/DB][?OPTION=...]; {_ENCODE}"
        )
    options = parse_qsl(found["query"] or "", keep_blank_values=True)
    own = {name: value for name, value in options if name in ("sentinel_username", "sentinel_password")}
    query = urlencode([(name, value) for name, value in options if name not in own])
    user = f"{found['user']}@" if found["user"] else ""
    return SentinelUrl(
        sentinels=tuple(_address(host) for host in found["hosts"].split(",")),
        service=unquote(found["service"]),
        server=f"redis://{user}/{found['db'] or 0}?{query}",
        tls=found["scheme"] == "rediss",
        username=own.get("sentinel_username"),
        password=own.get("sentinel_password"),
    )


def without_password(url: str) -> str:
    """To be shown."""
    return re.sub(r"(password=)[^&#]*", r"\1...", re.sub(r"//.*@", "//...@", url))


def _check_plain(url: str) -> None:
    """redis-py would take a host's bad port for a surprise, and a bad database for 0."""
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(
            "the Redis URL begins with neither redis://, rediss:// (TLS), unix:// nor redis+sentinel:// or "
            "rediss+sentinel://"
        )
    if parts.scheme == "unix":
        return
    try:
        parts.port  # noqa: B018
    except ValueError:
        raise ValueError(f"the Redis URL's port is no number from 0 to 65535; {_ENCODE}") from None
    if not re.fullmatch(r"(/\d*)?", parts.path):
        raise ValueError(f"the Redis URL's path is no database number, as in redis://HOST:6379/0; {_ENCODE}")


def _address(host: str) -> Address:
    found = _HOST.fullmatch(host.strip())
    port = int(found["port"] or _SENTINEL_PORT) if found else 0
    if found is None or not 0 < port < 65536:
        raise ValueError(f"{host!r} is no address of a Sentinel; expected HOST, HOST:PORT or [IPV6]:PORT")
    return found["ipv6"] or found["name"], port
