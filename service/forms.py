"""Forms (RFC 7578) as fields and files: UTF-8 only, all in memory, and not many parts."""

import re
from collections.abc import AsyncGenerator
from typing import Final

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from contract.errors import ErrorCode
from service.problems import ProblemError
from service.schemas import PICTURE_FIELDS

_MAX_FILES: Final = 8
_MAX_FIELDS: Final = 64
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{1,70}")  # RFC 2046, section 5.1.1


class _Parser(MultiPartParser):
    spool_max_size = 2**62  # no picture lies about in a temporary folder


async def read_form(
    content_type: str, chunks: AsyncGenerator[bytes, None], max_bytes: int
) -> list[tuple[str, str | bytes | None]]:
    """Names with their text, or their bytes if they are files; None for text that is not UTF-8, and U+FFFD in names
    that are not. Raises `ProblemError` (400).

    Some clients send a file without `filename`, or with `filename*`, which RFC 7578 does away with: bytes under the
    name of a picture are a file all the same.
    """
    _, options = parse_options_header(content_type.encode("latin-1", "replace"))
    boundary = options.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise _malformed("the content type has no boundary that is one")
    # Latin-1 keeps every byte as it came, so that UTF-8 can be told from what is not.
    headers = Headers({"content-type": f'multipart/form-data; charset=latin-1; boundary="{boundary.decode()}"'})
    parser = _Parser(headers, chunks, max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=max_bytes)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise _malformed(error.message.rstrip(".")) from error
    except (ValueError, LookupError) as error:  # encodings that a part's header names
        raise _malformed("the header of a part cannot be read") from error
    try:
        return [
            (_name(name), await value.read() if isinstance(value, UploadFile) else _text(name, value))
            for name, value in form.multi_items()
        ]
    finally:
        await form.close()


def _name(latin: str) -> str:
    return latin.encode("latin-1").decode("utf-8", "replace")


def _text(name: str, latin: str) -> str | bytes | None:
    sent = latin.encode("latin-1")
    try:
        return sent.decode("utf-8")
    except UnicodeDecodeError:
        return sent if name in PICTURE_FIELDS else None


def _malformed(what: str) -> ProblemError:
    return ProblemError(ErrorCode.INVALID_MULTIPART, f"{what}; expected a form as RFC 7578 has it")
