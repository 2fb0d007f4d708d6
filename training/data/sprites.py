"""Objects as premultiplied RGBA: emoji from the colour font, shapes drawn and supersampled.

Premultiplied colours resize and composite without the dark halo that straight alpha over transparent black leaves.
"""

import math
import subprocess
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from training.data.vocabulary import COLOURS, EMOJI

Sprite = npt.NDArray[np.uint8]
"""[height, width, 4], premultiplied by alpha."""

_BITMAP_SIZE: Final = 109  # the only strike of the font
_FONT_NAME: Final = "NotoColorEmoji.ttf"
_FONT_FOLDERS: Final = ("/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto", "/usr/share/fonts/google-noto-emoji")
_SUPERSAMPLING: Final = 8


class FontMissingError(FileNotFoundError):
    """The emoji font is not installed; the text says how to install it."""


@lru_cache(maxsize=8192)
def sprite(name: str, colour: str | None, longest: int) -> Sprite:
    """The object, cropped to what can be seen, its longest side `longest` pixels."""
    if name in EMOJI:
        return emoji_sprite(EMOJI[name], longest)
    if colour is None:
        raise ValueError(f"the shape {name!r} needs a colour")
    alpha = _shape_alpha(name, longest)
    rgb = np.asarray(COLOURS[colour], dtype=np.uint16)
    premultiplied = (alpha[..., None].astype(np.uint16) * rgb + 127) // 255
    return np.concatenate([premultiplied.astype(np.uint8), alpha[..., None]], axis=2)


@lru_cache(maxsize=8192)
def emoji_sprite(character: str, longest: int) -> Sprite:
    """Any emoji that the font holds as one glyph."""
    return _fit(_bitmap(character), longest)


@cache
def find_font() -> Path:
    """Raises FontMissingError where the emoji font is missing."""
    for folder in _FONT_FOLDERS:
        path = Path(folder) / _FONT_NAME
        if path.is_file():
            return path
    try:
        listed = subprocess.run(
            ["fc-list", ":", "file"], capture_output=True, text=True, check=False, timeout=30
        ).stdout
    except FileNotFoundError:
        listed = ""
    for line in listed.splitlines():
        path = Path(line.strip().rstrip(":"))
        if path.name == _FONT_NAME:
            return path
    raise FontMissingError(
        f"the font {_FONT_NAME} was not found in {', '.join(_FONT_FOLDERS)} nor by fc-list; "
        "install it: apt-get install fonts-noto-color-emoji"
    )


@cache
def _bitmap(character: str) -> Sprite:
    """The font's bitmap. Alpha and premultiplied colour are solved from one print on black and one on white."""
    font = ImageFont.truetype(str(find_font()), _BITMAP_SIZE)
    on_black, on_white = (_print(character, font, shade) for shade in (0, 255))
    alpha = 255 - (on_white - on_black).max(axis=2)
    rgba = np.concatenate([np.minimum(on_black, alpha[..., None]), alpha[..., None]], axis=2).astype(np.uint8)
    rows, columns = np.flatnonzero((alpha > 8).any(axis=1)), np.flatnonzero((alpha > 8).any(axis=0))
    return rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _print(character: str, font: ImageFont.FreeTypeFont, shade: int) -> npt.NDArray[np.int16]:
    page = Image.new("RGB", (192, 192), (shade, shade, shade))
    ImageDraw.Draw(page).text((16, 16), character, font=font, embedded_color=True)
    return np.asarray(page, dtype=np.int16)


def _fit(rgba: Sprite, longest: int) -> Sprite:
    height, width = rgba.shape[:2]
    factor = longest / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    bands = [Image.fromarray(np.ascontiguousarray(rgba[..., c])) for c in range(4)]  # "RGBA" would premultiply again
    resized = np.stack([np.asarray(b.resize(size, Image.Resampling.BICUBIC)) for b in bands], axis=2)
    resized[..., :3] = np.minimum(resized[..., :3], resized[..., 3:])  # bicubic overshoots at edges
    return resized


@lru_cache(maxsize=4096)
def _shape_alpha(name: str, longest: int) -> npt.NDArray[np.uint8]:
    fine = longest * _SUPERSAMPLING
    page = Image.new("L", (fine, fine), 0)
    draw = ImageDraw.Draw(page)
    if name == "circle":
        draw.ellipse((0, 0, fine - 1, fine - 1), fill=255)
    else:
        draw.polygon([(x * (fine - 1), y * (fine - 1)) for x, y in _outline(name)], fill=255)
    return np.asarray(page.resize((longest, longest), Image.Resampling.BOX))


def _outline(name: str) -> list[tuple[float, float]]:
    """Corners in the unit square, y downwards."""
    if name == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    if name == "triangle":
        return [(0.5, 0.06), (1.0, 0.94), (0.0, 0.94)]
    if name == "diamond":
        return [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)]
    if name == "star":
        radii = [
            (0.52, -math.pi / 2 + k * math.pi / 5) if k % 2 == 0 else (0.21, -math.pi / 2 + k * math.pi / 5)
            for k in range(10)
        ]
        return [(0.5 + r * math.cos(a), 0.53 + r * math.sin(a)) for r, a in radii]
    if name == "heart":
        turns = [2 * math.pi * k / 120 for k in range(120)]
        return [
            (
                0.5 + 16 * math.sin(t) ** 3 / 32,
                0.43 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 32,
            )
            for t in turns
        ]
    raise ValueError(f"unknown shape {name!r}")
