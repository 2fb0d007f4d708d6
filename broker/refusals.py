"""What Redis answers when it is there and does not do as asked: its memory or its disk is full, or it is not, or not
for certain, the primary."""

import re
from typing import Final

from redis.asyncio.connection import DefaultParser as AsyncDefaultParser
from redis.connection import DefaultParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

# Alone, or at the end of what Redis before 7 says of a script.
_FULL: Final = re.compile(r"(?:^|: -)(?:OOM|MISCONF) ")
# UNBLOCKED ends a blocking read when a primary becomes a replica.
_NOT_PRIMARY: Final = re.compile(r"(?:^|: -)(?:READONLY|MASTERDOWN|NOREPLICAS|UNBLOCKED) ")

LUA_EVEN_IF_FULL: Final = "redis.call('DEL', 'darkroom:')\n"
"""Begins scripts that must run in a full Redis too: what ends jobs frees memory, and a worker that could not renew its
leases would lose what it holds. Redis refuses commands that may take memory only while a script has written nothing.
The key, which never exists, is one that an ACL user for `darkroom:*` may touch."""


class WritesRefusedError(ResponseError):
    """Nothing was written; the same may be accepted later."""


class NotPrimaryError(RedisConnectionError):
    """A replica, or a primary without its replicas; nothing was written. Since redis-py then connects anew and asks
    again, whoever follows the primary finds it."""


class RefusalParser(DefaultParser):  # type: ignore[misc, valid-type]
    """redis-py has no class for most of these."""

    @classmethod
    def parse_error(cls, response: str) -> Exception:
        return _parsed(response) or super().parse_error(response)


class AsyncRefusalParser(AsyncDefaultParser):  # type: ignore[misc, valid-type]
    @classmethod
    def parse_error(cls, response: str) -> Exception:
        return _parsed(response) or super().parse_error(response)


def _parsed(response: str) -> RedisError | None:
    if _NOT_PRIMARY.search(response):
        return NotPrimaryError(response)
    return WritesRefusedError(response) if _FULL.search(response) else None
