"""What can be wrong with the picture store, told from what obstore raises."""

import re
from typing import Final

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

FAULTS: Final = (BaseError, OSError, ValueError)
"""What obstore raises."""

_STATUS: Final = re.compile(r"status code: (\d{3})")
_ANSWER: Final = re.compile(r"<Code>([^<]+)</Code>.*?<Message>([^<]*)</Message>", re.DOTALL)
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "ContainerNotFound"})
_FULL: Final = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})  # Ceph, MinIO
_PASSING: Final = frozenset({"408", "425", "429"})  # of the 4xx, those that ask to come back
_NO_SPACE: Final = ("No space left", "quota exceeded", "Quota exceeded")
_NO_WRITING: Final = ("Permission denied", "Read-only file system")
_NO_CREDENTIALS: Final = ("/latest/api/token", "/latest/meta-data", "metadata.google.internal")  # looked at last


class StoreError(Exception):
    """The store is away, refuses, or is full."""


class StoreFullError(StoreError):
    """No space is left. Nothing was written, and what stood under the key before still stands."""


class StoreRefusedError(StoreError):
    """The store answers, and says no: credentials, bucket or configuration are wrong. To wait does not help."""


class ObjectMissingError(StoreError):
    """There is no object under this key."""


def translated(error: Exception, key: str, reading: bool) -> StoreError:
    """`reading`: one object was asked for, so that "not found" can mean that object."""
    text = str(error)
    answer = _ANSWER.search(text)
    no_bucket = (answer is not None and answer[1] in _NO_BUCKET) or (
        isinstance(error, FileNotFoundError) and not reading
    )
    if isinstance(error, FileNotFoundError) and not no_bucket:
        return ObjectMissingError(f"the store has no object {key!r}")
    reason = f"{answer[1]}: {answer[2]}" if answer else text.partition("\n")[0]  # obstore's debug output follows
    if any(words in text for words in _NO_SPACE) or (answer is not None and answer[1] in _FULL):
        return StoreFullError(
            f"the store is full: nothing was written to {key!r}; free space there, or keep less with "
            "DARKROOM_RETENTION_SECONDS or DARKROOM_STORE_QUOTA_BYTES"
        )
    if no_bucket:
        return StoreRefusedError(f"the store has no such bucket ({reason}): create it, or correct DARKROOM_STORE_URL")
    if any(words in text for words in _NO_CREDENTIALS):
        return StoreRefusedError(
            f"no credentials for the store were found in the environment ({reason}): set what the cloud's own tools "
            "read, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if any(words in text for words in _NO_WRITING):
        return StoreRefusedError(
            f"the store's folder cannot be written or read ({reason}): give it to the user who runs this"
        )
    if _refuses(error, text):
        return StoreRefusedError(
            f"the store refuses {key!r} ({reason}): expected credentials, region and endpoint with which we may read, "
            "write, list and delete there"
        )
    return StoreError(f"the store failed on {key!r}: {type(error).__name__}: {reason}")


def _refuses(error: Exception, text: str) -> bool:
    status = _STATUS.search(text)
    said_no = status is not None and status[1].startswith(("3", "4")) and status[1] not in _PASSING
    return said_no or isinstance(error, PermissionDeniedError | UnauthenticatedError)
