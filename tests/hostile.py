"""Hypothesis strategies for pictures as an enemy sends them: whole files damaged in every way, and made-up ones."""

import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from hypothesis import strategies as st
from PIL import Image

from tests.service.picture_makers import (
    chunk,
    exif,
    file_of,
    header,
    interlaced_png,
    parts_of,
    png,
    riff,
    webp_canvas,
    with_right_sums,
    ycck_jpeg,
)

Draw = Callable[[st.SearchStrategy[Any]], Any]
SIZE: Final = (24, 16)


@cache
def whole_files() -> tuple[bytes, ...]:
    """24 × 16 pixels in every kind that the three formats have, some with metadata."""
    colours = Image.effect_noise(SIZE, 90).convert("RGB")
    clear = colours.copy()
    clear.putalpha(Image.linear_gradient("L").resize(SIZE))
    deep = Image.new("I;16", SIZE, 30_000)
    modes = [colours.convert(mode) for mode in ("RGB", "L", "1", "P")] + [clear, clear.convert("LA"), deep]
    files = [file_of(image) for image in modes]
    files += [file_of(image, "WEBP", lossless=True) for image in (colours, clear)]
    files += [file_of(image, "WEBP", quality=60) for image in (colours, clear)]
    files += [file_of(colours, "JPEG", progressive=progressive) for progressive in (False, True)]
    files += [file_of(colours.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    files += [interlaced_png(colours), ycck_jpeg(*SIZE, (99, 120, 130, 200))]
    told: dict[str, Any] = {"exif": b"Exif\0\0" + exif(1), "icc_profile": bytes(500)}
    files += [file_of(colours, kind, **told) for kind in ("PNG", "JPEG", "WEBP")]
    files.append(file_of(colours, "PNG", transparency=(1, 2, 3)))
    return tuple(files)


@st.composite
def damaged_files(draw: Draw) -> bytes:
    """Parts swapped, dropped, doubled, taken from other files or lying about their length, then single bytes."""
    parts = parts_of(draw(st.sampled_from(whole_files())))
    for change in draw(st.lists(st.sampled_from((_swap, _drop, _double, _graft, _lie, _spoil)), max_size=3)):
        change(draw, parts)
    if draw(st.booleans()) and parts[0].startswith(b"\x89PNG"):
        parts = with_right_sums(parts)
    data = b"".join(parts)
    for change in draw(st.lists(st.sampled_from((_flip, _cut, _repeat)), max_size=3)):
        data = change(draw, data)
    return data


def _place(draw: Draw, count: int) -> int:
    return draw(st.integers(0, max(0, count - 1)))  # type: ignore[no-any-return]


def _swap(draw: Draw, parts: list[bytes]) -> None:
    one, other = _place(draw, len(parts)), _place(draw, len(parts))
    parts[one], parts[other] = parts[other], parts[one]


def _drop(draw: Draw, parts: list[bytes]) -> None:
    if len(parts) > 1:
        del parts[_place(draw, len(parts))]


def _double(draw: Draw, parts: list[bytes]) -> None:
    place = _place(draw, len(parts))
    parts[place:place] = [parts[place]] * draw(st.sampled_from((1, 2, 200)))


def _graft(draw: Draw, parts: list[bytes]) -> None:
    others = parts_of(draw(st.sampled_from(whole_files())))
    parts.insert(_place(draw, len(parts)), others[_place(draw, len(others))])


def _lie(draw: Draw, parts: list[bytes]) -> None:
    """In the four bytes where each format has the length of a part, or near it."""
    place, offset = _place(draw, len(parts)), draw(st.sampled_from((0, 2, 4)))
    length = draw(st.sampled_from((0, 1, 12, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)) | st.integers(0, 2**32 - 1))
    order = draw(st.sampled_from("<>"))
    part = parts[place]
    parts[place] = part[:offset] + struct.pack(f"{order}I", length) + part[offset + 4 :]


def _spoil(draw: Draw, parts: list[bytes]) -> None:
    """One byte of a part's beginning, where its header is."""
    place = _place(draw, len(parts))
    parts[place] = _flip(draw, parts[place][:40]) + parts[place][40:]


def _flip(draw: Draw, data: bytes) -> bytes:
    if not data:
        return data
    place, mask = _place(draw, len(data)), draw(st.integers(1, 255))
    return data[:place] + bytes((data[place] ^ mask,)) + data[place + 1 :]


def _cut(draw: Draw, data: bytes) -> bytes:
    return data[: _place(draw, len(data) + 1)]


def _repeat(draw: Draw, data: bytes) -> bytes:
    """A piece put in once more somewhere else."""
    begin, length, to = _place(draw, len(data)), draw(st.integers(1, 64)), _place(draw, len(data))
    return data[:to] + data[begin : begin + length] + data[to:]


_SIDES: Final = st.sampled_from((0, 1, 7, 8, 63, 64, 65, 4096, 4097, 2**14, 2**16 - 1, 2**31 - 1)) | st.integers(0, 300)


@st.composite
def made_up_files(draw: Draw) -> bytes:
    """Headers of any content, with right checksums and some pixels behind them."""
    width, height = draw(_SIDES), draw(_SIDES)
    pixels = zlib.compress(bytes(draw(st.integers(0, 300_000))))
    if draw(st.booleans()):
        depth, colour = draw(st.sampled_from((0, 1, 2, 4, 8, 16, 255))), draw(st.integers(0, 7))
        extra = [chunk(kind, draw(st.binary(max_size=800))) for kind in draw(st.lists(_KINDS, max_size=4))]
        return png(header(width, height, depth, colour, draw(st.integers(0, 2))), *extra, chunk(b"IDAT", pixels))
    canvas = webp_canvas(width % 2**24 + 1, height % 2**24 + 1, draw(st.integers(0, 255)))
    bits = struct.pack("<I", width & 0x3FFF | (height & 0x3FFF) << 14)
    lossy = b"\x30\x01\x00\x9d\x01\x2a" + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    image = draw(st.sampled_from(((b"VP8L", b"\x2f" + bits), (b"VP8 ", lossy))))
    frame = (image[0], image[1] + draw(st.binary(max_size=200)))
    return riff(*draw(st.permutations([canvas, frame, (b"EXIF", draw(st.binary(max_size=40)))])))


_KINDS: Final = st.sampled_from([b"PLTE", b"tRNS", b"eXIf", b"acTL", b"iCCP", b"zTXt", b"tEXt", b"gAMA", b"IDAT"])


def hostile_files() -> st.SearchStrategy[bytes]:
    """Now and then a whole one."""
    return st.one_of(st.sampled_from(whole_files()), damaged_files(), damaged_files(), made_up_files(), st.binary())


def sendable_files(width: int, height: int) -> st.SearchStrategy[bytes]:
    """Whole files of this size, which a server has to take."""
    image = Image.effect_noise((width, height), 90).convert("RGB")
    files = [file_of(image), file_of(image, "JPEG", progressive=True), file_of(image, "WEBP", lossless=True)]
    return st.sampled_from(files)
