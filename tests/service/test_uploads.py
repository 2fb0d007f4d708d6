"""What becomes of pictures from outside, file by file."""

import io
from base64 import b64encode

import pytest
from PIL import Image

from contract.errors import ErrorCode
from service.problems import ProblemError
from service.uploads import Picture, Uploads
from tests.service.picture_makers import file_of


async def normalised(source: bytes | str, name: str = "image") -> Image.Image:
    picture: Picture = (await Uploads(256, 256 * 128, 64).decode({name: source}))[name]
    image = Image.open(io.BytesIO(picture.png))
    assert (image.format, image.size) == ("PNG", (picture.width, picture.height))
    return image


@pytest.mark.parametrize(
    "source",
    [
        file_of(Image.new("RGB", (20, 10), (255, 0, 0))),
        file_of(Image.new("RGB", (20, 10), (255, 0, 0)), "JPEG", quality=100),
        file_of(Image.new("RGB", (20, 10), (255, 0, 0)), "WEBP", lossless=True),
        file_of(Image.new("RGB", (20, 10), (255, 0, 0)).quantize(2)),
        file_of(Image.new("RGBA", (20, 10), (255, 0, 0, 255))),
        file_of(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG", quality=100),
    ],
    ids=["png", "jpeg", "webp", "palette", "opaque alpha", "cmyk"],
)
async def test_every_kind_becomes_plain_rgb(source: bytes) -> None:
    image = await normalised(source)
    assert image.mode == "RGB"
    red, green, blue = image.getpixel((5, 5))  # type: ignore[misc]
    assert (red >= 250, green <= 5, blue <= 5) == (True, True, True)


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "LA", "RGB", "RGBA", "P"])
async def test_masks_become_grey(mode: str) -> None:
    grey = Image.new("L", (16, 8), 0)
    grey.paste(255, (8, 0, 16, 8))
    source = Image.new("I;16", (16, 8), 0) if mode == "I;16" else grey.convert(mode)
    if mode == "I;16":
        source.paste(65535, (8, 0, 16, 8))
    mask = await normalised(file_of(source), "mask")
    assert mask.mode == "L"
    assert [mask.getpixel((x, 4)) for x in (0, 7, 8, 15)] == [0, 0, 255, 255]


async def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = await normalised(file_of(Image.new("I;16", (8, 8), 32768)))
    assert image.getpixel((0, 0)) in ((127, 127, 127), (128, 128, 128))


async def test_transparent_parts_turn_white_in_pictures_and_black_in_masks() -> None:
    source = file_of(Image.new("RGBA", (8, 8), (10, 20, 30, 0)))
    assert (await normalised(source)).getpixel((0, 0)) == (255, 255, 255)
    white = file_of(Image.new("RGBA", (8, 8), (255, 255, 255, 0)))
    assert (await normalised(white, "mask")).getpixel((0, 0)) == 0


async def test_orientation_is_applied_and_metadata_dropped() -> None:
    lying = Image.new("RGB", (30, 10))
    lying.paste((255, 255, 255), (0, 0, 15, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    exif[0x010E] = "where I live"
    image = await normalised(file_of(lying, "JPEG", exif=exif, quality=100, comment=b"where I live"))
    assert image.size == (10, 30)
    assert image.getpixel((5, 2)) == (255, 255, 255)
    assert image.info == {}
    assert not image.getexif()


@pytest.mark.parametrize(
    "wrap", ["{}", "data:image/png;base64,{}", "data:;base64,{}", "DATA:image/x;charset=a;BASE64,{}", " {}\n"]
)
async def test_base64_and_data_urls(wrap: str) -> None:
    text = b64encode(file_of(Image.new("RGB", (8, 8)))).decode()
    assert (await normalised(wrap.format(text))).size == (8, 8)
    lines = "\r\n".join(text[start : start + 20] for start in range(0, len(text), 20))
    assert (await normalised(wrap.format(lines))).size == (8, 8)


async def test_the_same_file_has_the_same_digest_however_it_came() -> None:
    data = file_of(Image.new("RGB", (8, 8)))
    uploads = Uploads(256, 256 * 256, 64)
    pictures = await uploads.decode({"image": data, "mask": b64encode(data).decode()})
    assert pictures["image"].source_sha256 == pictures["mask"].source_sha256


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (b"", ErrorCode.IMAGE_INVALID),
        (b"\x89PNG\r\n\x1a\n", ErrorCode.IMAGE_INVALID),
        (file_of(Image.effect_noise((64, 64), 9), "JPEG")[:-400], ErrorCode.IMAGE_INVALID),
        (
            file_of(Image.effect_noise((64, 64), 9).convert("RGB"), "WEBP", lossless=True)[:-400],
            ErrorCode.IMAGE_INVALID,
        ),
        (file_of(Image.effect_noise((64, 64), 9), "TIFF"), ErrorCode.IMAGE_INVALID),
        (file_of(Image.new("L", (257, 8))), ErrorCode.IMAGE_TOO_LARGE),
        (file_of(Image.new("L", (200, 200))), ErrorCode.IMAGE_TOO_LARGE),
    ],
    ids=["empty", "signature only", "cut jpeg", "cut webp", "tiff", "too wide", "too many pixels"],
)
async def test_what_is_refused(source: bytes, code: ErrorCode) -> None:
    with pytest.raises(ProblemError) as caught:
        await normalised(source)
    assert caught.value.code is code
    assert caught.value.errors[0].pointer == "/image"
    assert "expected" in caught.value.errors[0].detail


async def test_what_waits_for_the_store_is_bounded() -> None:
    """However small the files were, pictures that their requests still have are counted as they are kept."""
    uploads = Uploads(64, 64 * 64, 64)
    noise = Image.merge("RGB", [Image.effect_noise((64, 64), 100) for _ in range(3)])
    small = file_of(noise, "JPEG", quality=1)
    kept: list[Picture] = []
    while sum(len(picture.png) for picture in kept) <= 20 * 3 * 64 * 64:
        kept.append((await uploads.decode({"image": small}))["image"])
    with pytest.raises(ProblemError) as caught:
        await uploads.decode({"image": small})
    assert caught.value.code is ErrorCode.UPLOADS_BUSY
    held = sum(len(picture.png) for picture in kept)
    assert held > 5 * len(small) * len(kept)
    del caught, kept[-5:]
    assert (await uploads.decode({"image": small}))["image"].width == 64


async def test_damage_anywhere_never_raises_anything_else() -> None:
    """Every single damaged byte of a small file gives a picture or the refusal."""
    data = file_of(Image.effect_noise((9, 9), 50).convert("RGB"), "WEBP", lossless=True)
    answers = set()
    for source in (data, file_of(Image.effect_noise((9, 9), 50)), file_of(Image.effect_noise((9, 9), 50), "JPEG")):
        for place in range(0, len(source), 3):
            damaged = source[:place] + bytes([source[place] ^ 0xFF]) + source[place + 1 :]
            try:
                answers.add((await normalised(damaged)).mode)
            except ProblemError as error:
                answers.add(error.code)
    assert answers == {"RGB", ErrorCode.IMAGE_INVALID, ErrorCode.IMAGE_TOO_LARGE}
