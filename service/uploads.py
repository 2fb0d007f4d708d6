"""Pictures from outside: checked before they are decoded, decoded apart from the event loop, kept as plain PNG.

Only PNG, JPEG and WebP are read, by content and never by name or content type. EXIF orientation is applied, then all
metadata is dropped. Transparent parts of a picture become white; of a mask, black (kept). The values of a semantic map
are classes and stay what they are, so it has to be a PNG of one 8-bit channel or with a palette.
"""

import asyncio
import binascii
import io
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from contract.errors import ErrorCode
from service.problems import FieldError, ProblemError, pointer

IMAGE: Final = "image"
MASK: Final = "mask"
SEMANTIC_MAP: Final = "semantic_map"
_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_EXPECTED: Final = "expected a PNG, JPEG or WebP file"
_DATA_URL: Final = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
_AT_ONCE: Final = 2


@dataclass(frozen=True, slots=True)
class Picture:
    """`png` is the normalised file: RGB, or 8-bit grey for a mask and for a semantic map, whose largest value is
    `largest`. `source_sha256` is of the file as it came."""

    png: bytes
    width: int
    height: int
    source_sha256: str
    largest: int = 0


class PictureError(Exception):
    """Why a picture cannot be taken. `code` is image_invalid or image_too_large."""

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Uploads:
    """Decodes at most two pictures at once per gateway, whatever comes in. Sizes in pixels."""

    def __init__(self, max_side: int, max_pixels: int) -> None:
        self._max_side = max_side
        self._max_pixels = max_pixels
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def decode(self, given: Mapping[str, str | bytes]) -> dict[str, Picture]:
        """Pictures by field name ("image", "mask", "semantic_map"), each base64 text, a data URL or the file's bytes.

        Raises `ProblemError` with one entry for every picture that is not one.
        """
        pictures: dict[str, Picture] = {}
        faults: list[tuple[ErrorCode, FieldError]] = []
        for name, source in given.items():
            try:
                async with self._turns:
                    pictures[name] = await asyncio.to_thread(self._normalise, source, name)
            except PictureError as error:
                faults.append((error.code, FieldError(pointer=pointer(name), detail=str(error))))
        if faults:
            raise ProblemError(faults[0][0], "nothing was queued", [fault for _, fault in faults])
        return pictures

    def _normalise(self, source: str | bytes, name: str) -> Picture:
        data = _decode_text(source) if isinstance(source, str) else source
        try:
            # Pillow opens lazily: the header alone is read, whatever size it declares.
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                self._check_size(image.size)
                _refuse_animation(image)
                if name == SEMANTIC_MAP and image.format != "PNG":
                    raise PictureError(
                        ErrorCode.IMAGE_INVALID, f"a {image.format} file, which blurs classes; expected a PNG file"
                    )
                image.load()
                flat = _FLAT.get(name, _flat_picture)(ImageOps.exif_transpose(image))
        except PictureError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise self._too_large("more pixels than Pillow opens") from error
        except UnidentifiedImageError as error:
            raise PictureError(
                ErrorCode.IMAGE_INVALID, f"not a picture, or cut off at its start; {_EXPECTED}"
            ) from error
        except Exception as error:
            raise PictureError(ErrorCode.IMAGE_INVALID, f"broken or cut off ({error}); {_EXPECTED}, whole") from error
        file = io.BytesIO()
        flat.save(file, "PNG", compress_level=1)
        largest = _largest(flat) if name == SEMANTIC_MAP else 0
        return Picture(file.getvalue(), flat.width, flat.height, sha256(data).hexdigest(), largest)

    def _check_size(self, size: tuple[int, int]) -> None:
        width, height = size
        if max(size) > self._max_side or width * height > self._max_pixels:
            raise self._too_large(f"{width}×{height} pixels")

    def _too_large(self, got: str) -> PictureError:
        return PictureError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"the file declares {got}; expected sides of at most {self._max_side} and at most {self._max_pixels:,} "
            "pixels in all",
        )


def _decode_text(text: str) -> bytes:
    """Base64 (whitespace allowed) or a base64 data URL."""
    text = text.strip()
    head = _DATA_URL.match(text[:200])
    if head is not None:
        text = text[head.end() :]
    elif text[:5].lower() == "data:":
        raise PictureError(ErrorCode.IMAGE_INVALID, "a data URL that is not base64; expected data:image/png;base64,…")
    try:
        return b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(
            ErrorCode.IMAGE_INVALID, f"not base64 ({error}); expected a file as base64 text or as a data URL"
        ) from error


def _refuse_animation(image: Image.Image) -> None:
    """Phones store JPEG files with several pictures (MPO): of those the first is meant."""
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise PictureError(ErrorCode.IMAGE_INVALID, "an animation; expected a single picture")


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
    return _bare(_over(_eight_bit(image), (255, 255, 255)))


def _flat_mask(image: Image.Image) -> Image.Image:
    return _bare(_over(_eight_bit(image), (0, 0, 0)).convert("L"))


def _flat_map(image: Image.Image) -> Image.Image:
    if image.mode not in ("L", "P"):
        raise PictureError(
            ErrorCode.IMAGE_INVALID,
            f"pixels of mode {image.mode}; expected 8-bit grey values or palette indices, which are classes",
        )
    return _bare(Image.frombytes("L", image.size, image.tobytes()))


def _largest(image: Image.Image) -> int:
    return max(value for value, count in enumerate(image.histogram()) if count)


def _bare(image: Image.Image) -> Image.Image:
    """Without profiles, comments and positions."""
    image.info.clear()
    return image


_FLAT: Final[Mapping[str, Callable[[Image.Image], Image.Image]]] = {MASK: _flat_mask, SEMANTIC_MAP: _flat_map}
