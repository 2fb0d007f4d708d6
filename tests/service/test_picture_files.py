"""Odd pictures, kind by kind: read as they are meant, or refused before anything is decoded."""

import asyncio
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Final

import pytest
from PIL import Image

from contract.errors import ErrorCode
from contract.settings import Settings
from service.problems import ProblemError
from service.uploads import Uploads
from tests.service.picture_makers import (
    chunk,
    exif,
    exif_bomb,
    file_of,
    flat_png,
    header,
    interlaced_png,
    many_scans,
    parts_of,
    png,
    riff,
    segment,
    webp_canvas,
    with_segments,
    ycck_jpeg,
)

RED: Final = (255, 0, 0)
MEMORY_BOUND: Final = 256 * 2**20


async def taken(data: bytes, name: str = "image", side: int = 256) -> Image.Image:
    """As it goes into the store."""
    picture = (await Uploads(side, side * side // 2, 64).decode({name: data}))[name]
    image = Image.open(io.BytesIO(picture.png))
    image.load()
    assert image.info == {}
    return image


async def refused(data: bytes, side: int = 256) -> str:
    """Why."""
    with pytest.raises(ProblemError) as caught:
        await taken(data, side=side)
    assert caught.value.code in (ErrorCode.IMAGE_INVALID, ErrorCode.IMAGE_TOO_LARGE)
    assert caught.value.code.status == 422
    detail = caught.value.errors[0].detail
    assert "expected" in detail
    return detail


def scene() -> Image.Image:
    """Wider than high, with a colour of its own in every corner."""
    image = Image.new("RGB", (24, 16), (128, 128, 128))
    for place, colour in (((0, 0), RED), ((12, 0), (0, 255, 0)), ((0, 8), (0, 0, 255)), ((12, 8), (255, 255, 0))):
        image.paste(colour, (*place, place[0] + 12, place[1] + 8))
    return image


def corners(image: Image.Image) -> list[str]:
    """Upper left, upper right, lower left, lower right, to the nearest of the scene's colours."""
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 0): "yellow"}
    places = [(2, 2), (image.width - 3, 2), (2, image.height - 3), (image.width - 3, image.height - 3)]
    return [names[tuple(value > 127 for value in image.getpixel(place))] for place in places]  # type: ignore[union-attr,index]


# Where the file's corners go, upper left to lower right, and its size (EXIF 3.0, table of tag 0x0112).
UPRIGHT: Final = {
    1: ["red", "green", "blue", "yellow"],
    2: ["green", "red", "yellow", "blue"],
    3: ["yellow", "blue", "green", "red"],
    4: ["blue", "yellow", "red", "green"],
    5: ["red", "blue", "green", "yellow"],
    6: ["blue", "red", "yellow", "green"],
    7: ["yellow", "green", "blue", "red"],
    8: ["green", "yellow", "red", "blue"],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
async def test_every_orientation_in_every_format(orientation: int) -> None:
    size = (24, 16) if orientation < 5 else (16, 24)
    data = exif(orientation)
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0}), ("WEBP", {"lossless": True})):
        image = await taken(file_of(scene(), kind, exif=b"Exif\0\0" + data, **options))
        assert (image.size, corners(image)) == (size, UPRIGHT[orientation]), kind
    little = await taken(flat_png(24, 16, chunk(b"eXIf", exif(orientation, "<"))))
    assert little.size == size


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MM",
        b"MM\0*",
        exif(0),
        exif(9),
        exif(6)[:-6],
        exif(6).replace(b"MM\0*", b"MM\0+"),
        b"MM\0*\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        exif(6)[:12] + b"\0\7" + exif(6)[14:],
    ],
    ids=["empty", "2 bytes", "4 bytes", "0", "9", "cut", "no TIFF", "far away", "65535 entries", "type"],
)
async def test_broken_exif_turns_nothing(data: bytes) -> None:
    plain = file_of(scene(), "JPEG", quality=100, subsampling=0)
    for source in (
        with_segments(plain, segment(0xE1, b"Exif\0\0" + data)),
        flat_png(24, 16, chunk(b"eXIf", data)),
        riff(webp_canvas(24, 16, 0x08), *webp_parts(scene()), (b"EXIF", data)),
    ):
        assert (await taken(source)).size == (24, 16)


def webp_parts(image: Image.Image) -> list[tuple[bytes, bytes]]:
    """The chunks of the lossless file, without the file's own VP8X."""
    found = [(part[:4], part[8 : 8 + int.from_bytes(part[4:8], "little")]) for part in parts_of(
        file_of(image, "WEBP", lossless=True)
    )[1:]]  # fmt: skip
    return [(kind, data) for kind, data in found if kind != b"VP8X"]


@pytest.mark.parametrize(
    "source",
    [
        interlaced_png(scene()),
        file_of(scene(), "JPEG", quality=100, subsampling=0, progressive=True),
        file_of(scene(), "JPEG", quality=100, subsampling=0, restart_marker_blocks=1),
        file_of(scene().convert("RGBA"), "WEBP", quality=100),
        file_of(scene().convert("P", palette=Image.Palette.ADAPTIVE)),
        file_of(scene(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))], quality=100, subsampling=0),
        file_of(scene()) + b"more, after its end",
        file_of(scene(), icc_profile=bytes(3_000_000)),
        file_of(scene(), "JPEG", quality=100, subsampling=0, icc_profile=bytes(3_000_000)),
        file_of(scene(), "WEBP", lossless=True, icc_profile=bytes(300_000), xmp=bytes(300_000), exif=exif(1)),
    ],
    ids=[
        "interlaced",
        "progressive",
        "restarts",
        "lossy alpha",
        "palette",
        "mpo",
        "trailer",
        "icc",
        "jpeg icc",
        "webp",
    ],
)
async def test_unusual_files_are_read_as_they_are_meant(source: bytes) -> None:
    image = await taken(source)
    assert (image.mode, image.size, corners(image)) == ("RGB", (24, 16), UPRIGHT[1])


async def test_colours_of_cmyk_and_ycck() -> None:
    for source in (
        file_of(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100),
        ycck_jpeg(16, 16, (179, 171, 1, 255)),
    ):
        red, green, blue = (await taken(source)).getpixel((8, 8))  # type: ignore[misc]
        assert (red >= 250, green <= 5, blue <= 5) == (True, True, True), (red, green, blue)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "LA", "RGBA"])
async def test_transparency_of_every_kind(mode: str) -> None:
    """The left half is transparent, the right half is black: white and black then; for a mask, black all over."""
    image = Image.new("LA", (16, 16), (0, 255))
    image.paste((255, 0), (0, 0, 8, 16))
    if mode in ("LA", "RGBA"):
        source = file_of(image.convert(mode))
    else:
        plain = image.convert("L").convert(mode)
        key = plain.getpixel((0, 0))
        source = file_of(plain, transparency=key)
    picture = await taken(source)
    assert [picture.getpixel((x, 5)) for x in (0, 7, 8, 15)] == [(255,) * 3] * 2 + [(0,) * 3] * 2
    mask = await taken(source, "mask")
    assert mask.getextrema() == (0, 0)


async def test_sixteen_bits_of_every_kind() -> None:
    for colour, channels, expected in ((0, 1, 128), (2, 3, 128), (4, 2, 128), (6, 4, 128)):
        sample = b"\x80\x80" * min(channels, 3 if channels > 2 else 1) + (b"\xff\xff" if colour in (4, 6) else b"")
        rows = zlib.compress((b"\0" + sample * 16) * 16)
        image = await taken(png(header(16, 16, 16, colour), chunk(b"IDAT", rows)))
        assert all(abs(value - expected) <= 1 for value in image.getpixel((3, 3))), colour  # type: ignore[union-attr]
    key = png(header(16, 16, 16, 0), chunk(b"tRNS", b"\x80\x80"), chunk(b"IDAT", zlib.compress(bytes(33 * 16))))
    assert "expected an alpha channel" in await refused(key)


async def test_bombs_of_metadata_are_never_read() -> None:
    """Each of these takes Pillow by itself up to 60 MiB, or writes a warning per tag into the log."""
    text = zlib.compress(bytes(10**6), 9)
    texts = [chunk(b"zTXt", b"a%d\0\0" % number + text) for number in range(63)]
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 * 10**7), 9))
    assert (await taken(flat_png(24, 16, *texts, profile))).size == (24, 16)
    assert (await taken(flat_png(24, 16, chunk(b"eXIf", exif_bomb(1000, 10**6))))).size == (24, 16)
    bomb = exif_bomb(1000, 600_000)
    pieces = [segment(0xE1, b"Exif\0\0" + bomb[at : at + 60_000]) for at in range(0, len(bomb), 60_000)]
    assert (await taken(with_segments(file_of(scene(), "JPEG"), *pieces))).size == (24, 16)


async def test_more_pixels_than_declared_are_never_inflated() -> None:
    pixels = chunk(b"IDAT", zlib.compress(bytes(50_000_000), 9))
    assert (await taken(png(header(24, 16), pixels))).size == (24, 16)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (png(header(0, 0), chunk(b"IDAT", zlib.compress(b""))), "0×0"),
        (png(header(2**31 - 1, 2**31 - 1), chunk(b"IDAT", zlib.compress(b""))), "at most 256"),
        (riff(webp_canvas(2**24, 2**24), (b"VP8L", b"\x2f" + bytes(9))), "different sizes"),
        (riff((b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(9))), "16384×16384"),
        (riff(webp_canvas(24, 16, 2), *webp_parts(scene())), "single picture"),
        (riff(webp_canvas(24, 17), *webp_parts(scene())), "different sizes"),
        (riff((b"EXIF", exif(1))), "no picture"),
        (flat_png(24, 16, chunk(b"acTL", b"\0\0\0\2\0\0\0\0")), "single picture"),
        (flat_png(24, 16, chunk(b"CgBI", bytes(4))), "required and unknown"),
        (png(chunk(b"IDAT", b""), header(24, 16)), "header"),
        (flat_png(256, 2), "64 times"),
        (flat_png(2, 256), "64 times"),
        (many_scans(file_of(scene(), "JPEG", progressive=True), 101), "scans"),
        (with_segments(file_of(scene(), "JPEG"), segment(0xC0, b"\x08\0\x10\0\x10\x01\x01\x11\0")), "more than one"),
        (flat_png(24, 16, *[chunk(b"teXt")] * 100_001), "100,000 parts"),
        (b"\xff\xd8" + segment(0xFE, b"") * 100_001, "100,000 parts"),
        (riff(*[(b"none", b"")] * 100_001), "100,000 parts"),
    ],
    ids=[
        "zero", "2³¹", "canvas 2²⁴", "webp 2¹⁴", "webp animation", "webp lies", "webp empty", "apng", "unknown part",
        "header late", "wide", "high", "scans", "two frames", "png parts", "jpeg parts", "webp parts",
    ],
)  # fmt: skip
async def test_refused_before_decoding(source: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("a decoder saw the file")

    monkeypatch.setattr(Image, "open", unexpected)
    assert words in await refused(source)


async def test_one_pixel_and_just_the_ratio() -> None:
    assert (await taken(flat_png(1, 1))).size == (1, 1)
    assert (await taken(flat_png(128, 2))).size == (128, 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_cut_off_anywhere(kind: str) -> None:
    """Never a whole picture, except where all but the mark of its end is there."""
    data = file_of(Image.effect_noise((20, 20), 90).convert("RGB"), kind)
    for length in range(len(data) - 2):
        await refused(data[:length])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its peak")
async def test_memory_is_bounded(tmp_path: Path) -> None:
    """The largest pictures that the default limits take, of the kinds that cost most, six at once: two are decoded at a
    time. Beside their own bytes the peak stays below the bound that `service.uploads` tells."""
    side = 2048
    ramp = Image.linear_gradient("L").resize((side, side))
    colours = Image.merge("RGBA", [ramp, ramp.rotate(90), ramp.rotate(180), ramp.rotate(270)])
    files = {
        "rgba.png": file_of(colours, compress_level=1),
        "alpha.webp": file_of(colours, "WEBP", lossless=True, method=0, quality=0),
        "progressive.jpg": file_of(colours.convert("RGB"), "JPEG", progressive=True, subsampling=0),
        "cmyk.jpg": file_of(colours.convert("CMYK"), "JPEG"),
        "grey16.png": file_of(ramp.convert("I;16"), compress_level=1),
        "bits.png": file_of(ramp.convert("1"), transparency=0),
    }
    for name, data in files.items():
        assert len(data) <= Settings().max_body_bytes, name
        (tmp_path / name).write_bytes(data)
    program = (
        "import asyncio, json, re, sys; from pathlib import Path; from service.uploads import Uploads\n"
        "async def all_at_once(files, uploads):\n"
        "    return await asyncio.gather(*(uploads.decode({'image': data}) for data in files))\n"
        "files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]\n"
        "def peak():\n"
        "    return 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "done = asyncio.run(all_at_once(files, Uploads(4096, 2048 * 2048, 64)))\n"
        "assert all((one['image'].width, one['image'].height) == (2048, 2048) for one in done)\n"
        "print(json.dumps([peak() - before, sum(len(one['image'].png) for one in done)]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    grown, results = json.loads(output)
    print(f"{grown / 2**20:.0f} MiB, {results / 2**20:.0f} MiB of them results")
    assert grown - results < MEMORY_BOUND
