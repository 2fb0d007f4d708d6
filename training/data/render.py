"""Scene to pixels."""

import numpy as np
import numpy.typing as npt

from training.data.scenes import Item, Scene
from training.data.sprites import Sprite, sprite
from training.data.vocabulary import COLOURS

Picture = npt.NDArray[np.uint8]
"""[side, side, 3], sRGB."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom lie outside."""


def render(scene: Scene, side: int) -> Picture:
    """The picture, `side` pixels square. Native is 128; any other side shows the same scene."""
    picture = render_background(scene, side)
    for item in scene.items:
        composite(picture, item_sprite(item, side), item.x, item.y)
    return picture


def object_boxes(scene: Scene, side: int) -> list[Box]:
    """The box of each item, clipped to the picture."""
    boxes = []
    for item in scene.items:
        height, width = item_sprite(item, side).shape[:2]
        left, top = _corner(item.x, item.y, side, height, width)
        boxes.append((max(left, 0), max(top, 0), min(left + width, side), min(top + height, side)))
    return boxes


def object_box(scene: Scene, side: int) -> Box:
    """The box around all items: what an inpainting mask has to cover."""
    lefts, tops, rights, bottoms = zip(*object_boxes(scene, side), strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def render_background(scene: Scene, side: int) -> Picture:
    """The background alone. Patterns are two shades of one colour, so that its name stays true."""
    base = np.clip(np.asarray(COLOURS[scene.background], dtype=np.float32) + np.asarray(scene.tint), 0, 255)
    if scene.style == "plain":
        return np.full((side, side, 3), base.round().astype(np.uint8))
    weight = _pattern(scene.style, scene.phase, side)[..., None]
    return np.asarray((base + weight * (_shade(base) - base)).round(), dtype=np.uint8)


def _shade(base: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The second shade: a darker one, or a lighter one where the colour is dark already."""
    if base.max() < 60:
        return np.asarray(base + 50, dtype=np.float32)
    return np.asarray(base * (0.86 if base.min() > 200 else 0.76), dtype=np.float32)


def _pattern(style: str, phase: float, side: int) -> npt.NDArray[np.float32]:
    """[side, side], 0 where the first shade is, 1 where the second is; edges are one pixel soft."""
    period = side / 6  # coarse enough for latents at an eighth of the pixels
    axis = (np.arange(side, dtype=np.float32) + 0.5) / period + phase
    if style == "gradient":
        return np.repeat(np.linspace(0, 1, side, dtype=np.float32)[:, None], side, axis=1)
    wave = np.sin(2 * np.pi * axis) * period / np.pi  # slope ±2 per pixel at each edge, ±1 once halved
    if style == "striped":
        return np.repeat(np.clip(0.5 + wave / 2, 0, 1)[None, :], side, axis=0)
    if style == "checkered":
        half = np.clip(np.sin(np.pi * axis) * period / np.pi, -1, 1)
        return np.asarray(0.5 + np.outer(half, half) / 2, dtype=np.float32)
    distance = np.hypot(*np.meshgrid((axis % 1) - 0.5, (axis % 1) - 0.5))  # "dotted"
    return np.asarray(np.clip((0.3 - distance) * period + 0.5, 0, 1), dtype=np.float32)


def _corner(x: float, y: float, side: int, height: int, width: int) -> tuple[int, int]:
    return round(x * side - width / 2), round(y * side - height / 2)


def composite(picture: Picture, rgba: Sprite, x: float, y: float) -> None:
    """Lays a sprite centred at (x, y), in fractions of the side, onto the picture, in place; cut off at the edges."""
    side = picture.shape[0]
    left, top = _corner(x, y, side, *rgba.shape[:2])
    rgba = rgba[max(0, -top) : side - top, max(0, -left) : side - left]
    under = picture[max(top, 0) : max(top, 0) + rgba.shape[0], max(left, 0) : max(left, 0) + rgba.shape[1]]
    passed = under * (255 - rgba[..., 3:].astype(np.uint16))  # 0 to 65025
    under[...] = rgba[..., :3] + ((passed + 127) // 255).astype(np.uint8)


def item_sprite(item: Item, side: int) -> Sprite:
    return sprite(item.name, item.colour, max(2, round(item.scale * side)))
