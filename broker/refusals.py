"""What Redis answers when it is there and takes no writes: its memory or its disk is full, replicas are missing, or it
has become one itself."""

import re
from typing import Final

from redis.asyncio.connection import DefaultParser as AsyncDefaultParser
from redis.connection import DefaultParser
from redis.exceptions import ResponseError

# Alone, or at the end of what Redis before 7 says of a script.
_REFUSAL: Final = re.compile(r"(?:^|: -)(?:OOM|MISCONF|NOREPLICAS|MASTERDOWN|READONLY) ")

LUA_EVEN_IF_FULL: Final = "redis.call('DEL', '')\n"
"""Begins scripts that must run in a full Redis too: what ends jobs frees memory, and a worker that could not renew its
leases would lose what it holds. Redis refuses commands that may take memory only while a script has written nothing."""


class WritesRefusedError(ResponseError):
    """Nothing was written; the same may be accepted later."""


class RefusalParser(DefaultParser):  # type: ignore[misc, valid-type]
    """redis-py has no class for most of these."""

    @classmethod
    def parse_error(cls, response: str) -> Exception:
        return _parsed(response) or super().parse_error(response)


class AsyncRefusalParser(AsyncDefaultParser):  # type: ignore[misc, valid-type]
    @classmethod
    def parse_error(cls, response: str) -> Exception:
        return _parsed(response) or super().parse_error(response)


def _parsed(response: str) -> WritesRefusedError | None:
    return WritesRefusedError(response) if _REFUSAL.search(response) else None
