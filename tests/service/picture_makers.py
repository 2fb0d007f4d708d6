"""Files that Pillow would not write: parts of the three formats put together by hand."""

import io
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from PIL import Image

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
# Adam7 (W3C PNG 3, section 8.2): first column and row, steps, of the seven passes.
_ADAM7: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*parts: bytes) -> bytes:
    return b"".join((SIGNATURE, *parts, chunk(b"IEND")))


def flat_png(width: int, height: int, *extra: bytes) -> bytes:
    """Black RGB with further chunks before its pixels."""
    return png(header(width, height), *extra, chunk(b"IDAT", zlib.compress((b"\0" + bytes(3 * width)) * height)))


def interlaced_png(image: Image.Image) -> bytes:
    """Of an RGB picture."""
    rows = []
    for left, top, across, down in _ADAM7:
        for y in range(top, image.height, down):
            pixels = [image.getpixel((x, y)) for x in range(left, image.width, across)]
            if pixels:
                rows.append(b"\0" + b"".join(bytes(pixel) for pixel in pixels))  # type: ignore[arg-type]
    return png(header(*image.size, interlace=1), chunk(b"IDAT", zlib.compress(b"".join(rows))))


def ycck_jpeg(width: int, height: int, samples: tuple[int, int, int, int]) -> bytes:
    """Flat; `samples` are Y, Cb, Cr and inverted black, as they stand in the file."""
    first, second, third, black = (255 - sample for sample in samples)
    data = file_of(Image.new("CMYK", (width, height), (first, second, third, black)), "JPEG", quality=100)
    place = data.index(b"Adobe") + 11  # the colour transform; 2 is YCCK
    assert data[place] == 0
    return data[:place] + b"\2" + data[place + 1 :]


def segment(marker: int, data: bytes) -> bytes:
    """Of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def exif(orientation: int, order: str = ">") -> bytes:
    """A TIFF header and one directory with this one tag."""
    mark = {">": b"MM\0*", "<": b"II*\0"}[order]
    return mark + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def exif_bomb(entries: int, size: int) -> bytes:
    """Every tag claims all `size` bytes of the data."""
    tags = [struct.pack(">HHII", 0x0200 + tag, 7, size - 8, 8) for tag in range(entries)]
    data = b"MM\0*" + struct.pack(">IH", 8, entries) + b"".join(tags) + bytes(4)
    return data + bytes(size - len(data))


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def many_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive file whose last scan comes so often."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * count + jpeg[-2:]


def riff(*parts: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks."""
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) & 1) for kind, data in parts)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    sides = ((side - 1).to_bytes(3, "little") for side in (width, height))
    return b"VP8X", bytes((flags, 0, 0, 0)) + b"".join(sides)


def parts_of(data: bytes) -> list[bytes]:
    """A whole PNG, JPEG or WebP file, cut where its parts begin; joined, they are the file."""
    cuts = [0]
    if data.startswith(SIGNATURE):
        at = 8
        while at < len(data):
            cuts.append(at)
            at += 12 + int.from_bytes(data[at : at + 4], "big")
    elif data.startswith(b"\xff\xd8"):
        at = 2
        while data[at + 1] != 0xDA:
            cuts.append(at)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        cuts += [at, len(data) - 2]
    else:
        at = 12
        while at < len(data):
            cuts.append(at)
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 8 + length + (length & 1)
    return [data[begin:end] for begin, end in pairwise([*cuts, len(data)])]


def with_right_sums(parts: Sequence[bytes]) -> list[bytes]:
    """Chunks of a PNG whose checksums fit again, so that what is wrong in them reaches the decoder."""
    return [part[:-4] + struct.pack(">I", zlib.crc32(part[4:-4])) if len(part) >= 12 else part for part in parts]
