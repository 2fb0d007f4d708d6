"""Pictures from outside: checked before they are decoded, decoded apart from the event loop, kept as plain PNG.

Only PNG, JPEG and WebP are read, by content and never by name or content type. EXIF orientation is applied, then all
metadata is dropped. Transparent parts of a picture become white; of a mask, black (kept). The values of a semantic map
are classes and stay what they are, so it has to be a PNG of one 8-bit channel or with a palette.

Memory: two pictures are decoded at once. At the default limit of 2048 × 2048 pixels that takes 150 MiB beside the
bodies; a test holds it below 256 MiB. What the bodies take is bounded apart (`body.Bodies`), and so is what waits for
the store: a picture of 100 kB may be 12 MB as PNG.
"""

import asyncio
import binascii
import io
import re
import weakref
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from PIL import Image, UnidentifiedImageError

from contract.errors import ErrorCode
from service.picture_files import PictureError, PictureFile, read_file
from service.problems import FieldError, ProblemError, pointer

IMAGE: Final = "image"
MASK: Final = "mask"
SEMANTIC_MAP: Final = "semantic_map"
_DATA_URL: Final = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
_SPACE: Final = b" \t\r\n\v\f"
_AT_ONCE: Final = 2
_HELD: Final = 20
"""Pictures of the largest size, or more smaller ones, that may wait for the store: 240 MiB at the default limit."""
_GREY, _PALETTE = 0, 3  # colour types of PNG
# EXIF's orientations other than 1, which is the picture as it is.
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Picture:
    """`png` is the normalised file: RGB, or 8-bit grey for a mask and for a semantic map, whose largest value is
    `largest`. `source_sha256` is of the file as it came."""

    png: bytes
    width: int
    height: int
    source_sha256: str
    largest: int = 0


class Uploads:
    """Decodes at most two pictures at once per gateway, whatever comes in. Sizes in pixels; `max_ratio` is that of the
    longer side to the shorter one."""

    def __init__(self, max_side: int, max_pixels: int, max_ratio: float) -> None:
        self._max_side = max_side
        self._max_pixels = max_pixels
        self._max_ratio = max_ratio
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._max_held = 3 * max_pixels * _HELD
        self._held = 0  # bytes of pictures that somebody still has

    async def decode(self, given: Mapping[str, str | bytes]) -> dict[str, Picture]:
        """Pictures by field name ("image", "mask", "semantic_map"), each base64 text, a data URL or the file's bytes.

        Raises `ProblemError`: with one entry for every picture that is not one; 429 while too many wait for the store.
        """
        pictures: dict[str, Picture] = {}
        faults: list[tuple[ErrorCode, FieldError]] = []
        for name, source in given.items():
            try:
                async with self._turns:
                    self._refuse_more_than_fit()
                    pictures[name] = await asyncio.to_thread(self._normalise, source, name)
                self._hold(pictures[name])
            except PictureError as error:
                faults.append((error.code, FieldError(pointer=pointer(name), detail=str(error))))
        if faults:
            raise ProblemError(faults[0][0], "nothing was queued", [fault for _, fault in faults])
        return pictures

    def _refuse_more_than_fit(self) -> None:
        if self._held > self._max_held:
            detail = "the pictures of other requests still wait for the store; send it again soon"
            raise ProblemError(ErrorCode.UPLOADS_BUSY, detail)

    def _hold(self, picture: Picture) -> None:
        """Until nobody has it any more, however its request ends."""
        size = len(picture.png)
        self._held += size
        weakref.finalize(picture, self._let_go, size).atexit = False

    def _let_go(self, size: int) -> None:
        self._held -= size

    def _normalise(self, source: str | bytes, name: str) -> Picture:
        data = _decode_text(source) if isinstance(source, str) else source
        file = read_file(data)
        self._check_size(file.width, file.height)
        if name == SEMANTIC_MAP:
            _check_map(file)
        try:
            flat = _decode(file, _FLAT.get(name, _flat_picture))
        except PictureError:
            raise
        except Exception as error:
            told = "" if isinstance(error, UnidentifiedImageError) else str(error)  # that one's tells of our memory
            detail = f"broken or cut off ({told or 'it cannot be read'}); expected a {file.format} file, whole"
            raise PictureError(ErrorCode.IMAGE_INVALID, detail) from error
        png = io.BytesIO()
        flat.save(png, "PNG", compress_level=1)
        largest = _largest(flat) if name == SEMANTIC_MAP else 0
        return Picture(png.getvalue(), flat.width, flat.height, sha256(data).hexdigest(), largest)

    def _check_size(self, width: int, height: int) -> None:
        short, long = sorted((width, height))
        if short == 0:
            raise PictureError(ErrorCode.IMAGE_INVALID, f"the file declares {width}×{height} pixels; expected some")
        if long > self._max_side or width * height > self._max_pixels:
            raise PictureError(
                ErrorCode.IMAGE_TOO_LARGE,
                f"the file declares {width}×{height} pixels; expected sides of at most {self._max_side} and at most "
                f"{self._max_pixels:,} pixels in all",
            )
        if long > short * self._max_ratio:
            detail = f"the file declares {width}×{height} pixels; expected a longer side of at most "
            raise PictureError(ErrorCode.IMAGE_INVALID, f"{detail}{self._max_ratio:g} times the shorter one")


def _decode(file: PictureFile, flatten: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Upright, of the kind that the field wants, without any metadata. Raises whatever Pillow does."""
    with Image.open(io.BytesIO(file.data), formats=(file.format,)) as image:
        if image.size != (file.width, file.height):
            raise PictureError(ErrorCode.IMAGE_INVALID, "its parts tell different sizes; expected a whole file")
        image.load()
        flat = flatten(image)
    turn = _UPRIGHT.get(file.orientation)
    if turn is not None:
        flat = flat.transpose(turn)
    flat.info.clear()
    return flat


def _decode_text(text: str) -> bytes:
    """Base64 (whitespace allowed) or a base64 data URL."""
    text = text.strip()
    head = _DATA_URL.match(text[:200])
    if head is not None:
        text = text[head.end() :]
    elif text[:5].lower() == "data:":
        raise PictureError(ErrorCode.IMAGE_INVALID, "a data URL that is not base64; expected data:image/png;base64,…")
    try:
        # Not by `split`, which makes a list many times as large as a text of short words.
        return b64decode(text.encode("ascii").translate(None, _SPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        reason = "it has characters beyond ASCII" if isinstance(error, UnicodeError) else error
        raise PictureError(
            ErrorCode.IMAGE_INVALID, f"not base64 ({reason}); expected a file as base64 text or as a data URL"
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow would clip instead of scale."""
    if image.mode.startswith("I"):
        return image.point(lambda value: value * (255 / 65535)).convert("L")
    return image


def _over(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    front = image.convert("RGBA")
    back = Image.new("RGBA", front.size, (*background, 255))
    return Image.alpha_composite(back, front).convert("RGB")


def _flat_picture(image: Image.Image) -> Image.Image:
    return _over(_eight_bit(image), (255, 255, 255))


def _flat_mask(image: Image.Image) -> Image.Image:
    return _over(_eight_bit(image), (0, 0, 0)).convert("L")


def _check_map(file: PictureFile) -> None:
    """Raises `PictureError` where pixels are no classes: grey values of fewer bits would be scaled, as PNG has it."""
    if file.format != "PNG":
        raise _no_map(f"a {file.format} file, which blurs classes; expected a PNG file")
    depth, colour = file.data[24], file.data[25]  # of its header
    if colour != _PALETTE and (colour, depth) != (_GREY, 8):
        found = f"a PNG file of colour type {colour} with {depth} bits per channel"
        raise _no_map(f"{found}; expected 8-bit grey values or palette indices, which are classes")


def _no_map(detail: str) -> PictureError:
    return PictureError(ErrorCode.IMAGE_INVALID, detail)


def _flat_map(image: Image.Image) -> Image.Image:
    """The values as they stand in the file, whatever colours a palette gives them."""
    return Image.frombytes("L", image.size, image.tobytes())


def _largest(image: Image.Image) -> int:
    return max(value for value, count in enumerate(image.histogram()) if count)


_FLAT: Final[Mapping[str, Callable[[Image.Image], Image.Image]]] = {MASK: _flat_mask, SEMANTIC_MAP: _flat_map}
