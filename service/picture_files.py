"""What a picture file tells before anything of it is decoded, and the same file with only what its decoder needs.

PNG (W3C PNG 3, section 5), JPEG (ITU-T T.81, annex B) and WebP (RFC 9649), known by their content. Profiles, texts,
thumbnails, further pictures and unknown parts never reach the decoder, whatever their size; of EXIF only the
orientation is read. Every check here costs time in proportion to the file, not to what the file declares.
"""

import re
from dataclasses import dataclass
from struct import pack, unpack_from
from typing import Final

from contract.errors import ErrorCode
from service.exif import orientation_of

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_EXPECTED: Final = "expected a PNG, JPEG or WebP file"
_MAX_PARTS: Final = 100_000
# A progressive JPEG has about ten scans. Each costs a pass over all pixels, however few bytes it takes in the file.
_MAX_SCANS: Final = 100
_PNG_KEPT: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Not stuffed zeros, fill bytes or restarts, which belong to the coded pixels.
_JPEG_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_JPEG_DROPPED: Final = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}  # Adobe's 0xEE tells the colour space
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WEBP_ANIMATED, _WEBP_ALPHA = 0x02, 0x10


class PictureError(Exception):
    """Why a picture cannot be taken. `code` is image_invalid or image_too_large."""

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True, slots=True)
class PictureFile:
    """`format` as Pillow names it; `orientation` is EXIF's, 1 to 8; width and height are those before it is applied."""

    format: str
    width: int
    height: int
    orientation: int
    data: bytes


def read_file(data: bytes) -> PictureFile:
    """Raises `PictureError` (image_invalid)."""
    if data.startswith(_PNG):
        return _read_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _read_webp(data)
    raise _invalid(f"not a picture, or cut off at its start; {_EXPECTED}")


def _read_png(data: bytes) -> PictureFile:
    view, at, kept = memoryview(data), len(_PNG), [memoryview(_PNG)]
    kind, orientation, header = b"", 1, b""
    for _ in range(_MAX_PARTS):
        if kind == b"IEND":
            break
        if at + 12 > len(data):
            raise _cut_off()
        length, kind = unpack_from(">I4s", data, at)
        start, end = at + 8, at + 12 + length
        if end > len(data):
            raise _cut_off()
        if (kind == b"IHDR") != (at == len(_PNG)) or (kind == b"IHDR" and length != 13):
            raise _broken("its header is not at its start")
        if kind == b"IHDR":
            header = data[start : end - 4]
        elif kind == b"eXIf":
            orientation = orientation_of(view[start : end - 4])
        elif kind == b"acTL" and length >= 4 and unpack_from(">I", data, start)[0] > 1:
            raise _animation()
        elif kind == b"tRNS" and header[8] == 16:
            raise _invalid("16 bits per channel and one colour that is transparent; expected an alpha channel instead")
        elif kind not in _PNG_KEPT and not kind[0] & 0x20:
            raise _broken(f"its part {kind!r} is required and unknown")
        if kind in _PNG_KEPT:
            kept.append(view[at:end])
        at = end
    else:
        raise _too_many_parts()
    width, height = unpack_from(">II", header)
    return PictureFile("PNG", width, height, orientation, b"".join(kept))


def _read_jpeg(data: bytes) -> PictureFile:
    """The first picture of the file: phones append others."""
    view, at, kept = memoryview(data), 2, [memoryview(data)[:2]]
    orientation, scans, size = 1, 0, None
    for _ in range(_MAX_PARTS):
        found = _JPEG_MARKER.search(data, at)
        begin = found.start() if found else len(data)
        if scans:
            kept.append(view[at:begin])  # coded pixels
        if found is None:
            break  # without an end: the decoder sees whether all pixels are there
        marker = data[begin + 1]
        if marker == 0xD9:
            kept.append(view[begin : begin + 2])
            break
        at = begin + 2 + _jpeg_length(data, begin)
        if marker in _JPEG_FRAMES:
            if size is not None or at - begin < 9:
                raise _broken("it has more than one header, or half of one")
            size = unpack_from(">HH", data, begin + 5)
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", begin + 4):
            orientation = orientation_of(view[begin + 4 : at])
        scans += marker == 0xDA
        if scans > _MAX_SCANS:
            raise _invalid(f"more than {_MAX_SCANS} scans; expected at most so many, or a JPEG that is not progressive")
        if marker not in _JPEG_DROPPED:
            kept.append(view[begin:at])
    else:
        raise _too_many_parts()
    if size is None:
        raise _cut_off()
    height, width = size
    return PictureFile("JPEG", width, height, orientation, b"".join(kept))


def _jpeg_length(data: bytes, begin: int) -> int:
    """Of the segment whose marker is at `begin`, without the marker."""
    if begin + 4 > len(data):
        raise _cut_off()
    length: int = unpack_from(">H", data, begin + 2)[0]
    if length < 2:
        raise _broken("a part of it has no length")
    if begin + 2 + length > len(data):
        raise _cut_off()
    return length


def _read_webp(data: bytes) -> PictureFile:
    view, at, kept, sizes, orientation = memoryview(data), 12, list[bytes | memoryview](), set[tuple[int, int]](), 1
    end: int = 8 + unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise _cut_off()
    for _ in range(_MAX_PARTS):
        if at + 8 > end:
            break
        kind, length = unpack_from("<4sI", data, at)
        start, stop = at + 8, at + 8 + length
        if stop > end:
            raise _cut_off()
        if kind in (b"ANIM", b"ANMF") or (kind == b"VP8X" and length and data[start] & _WEBP_ANIMATED):
            raise _animation()
        if kind in (b"VP8X", b"VP8 ", b"VP8L"):
            sizes.add(_webp_size(kind, view[start:stop]))
        if kind == b"VP8X":
            kept += [view[at:start], bytes((data[start] & _WEBP_ALPHA,)), view[start + 1 : stop]]
        elif kind in (b"VP8 ", b"VP8L", b"ALPH"):
            kept += [view[at:stop], bytes(length & 1)]
        elif kind == b"EXIF":
            orientation = orientation_of(view[start:stop])
        at = stop + (length & 1)
    else:
        raise _too_many_parts()
    if len(sizes) != 1:
        raise _broken("its parts tell different sizes" if sizes else "it holds no picture")
    body = b"WEBP" + b"".join(kept)
    return PictureFile("WEBP", *sizes.pop(), orientation, b"RIFF" + pack("<I", len(body)) + body)


def _webp_size(kind: bytes, part: memoryview) -> tuple[int, int]:
    if kind == b"VP8X" and len(part) == 10:
        return 1 + int.from_bytes(part[4:7], "little"), 1 + int.from_bytes(part[7:10], "little")
    if kind == b"VP8 " and len(part) >= 10 and bytes(part[3:6]) == b"\x9d\x01\x2a":
        width, height = unpack_from("<HH", part, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(part) >= 5 and part[0] == 0x2F:
        bits: int = unpack_from("<I", part, 1)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise _broken("its header is not one")


def _invalid(detail: str) -> PictureError:
    return PictureError(ErrorCode.IMAGE_INVALID, detail)


def _broken(what: str) -> PictureError:
    return _invalid(f"broken ({what}); {_EXPECTED}, whole")


def _cut_off() -> PictureError:
    return _invalid(f"cut off; {_EXPECTED}, whole")


def _animation() -> PictureError:
    return _invalid("an animation; expected a single picture")


def _too_many_parts() -> PictureError:
    return _invalid(
        f"in more than {_MAX_PARTS:,} parts; expected {_EXPECTED.removeprefix('expected ')} as programs write"
    )
