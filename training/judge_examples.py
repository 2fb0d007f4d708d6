"""What the judge learns from: real renders, and pictures spoilt in the ways a generator fails, to be rejected."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from training.data.render import Picture, composite, item_sprite, object_box, render, render_background
from training.data.scenes import Item, Scene
from training.data.sprites import Sprite, emoji_sprite
from training.data.vocabulary import COLOURS, EMOJI, SHAPES, STYLES
from training.judge import COLOUR_CLASSES, OBJECT_CLASSES, REJECT

SIDE: Final = 128
IGNORE: Final = -100
"""The class that the loss leaves out, for a head that has no right answer."""

_STRANGERS: Final = "🐶🐵🦁🐯🐻🐨🐮🐔🍎🍊🍋🍉🍇🍒🥑🍔🎂🚁🚲🚌⛵🌵🌹🌙🎈👑🔑⏰🎁💎⚽🏀🎸🤖👽💀🦋🐢🐳🦉☎🔔✂🧊🥕🌽"


@dataclass(frozen=True)
class Labels:
    """Class numbers of the three heads, or IGNORE."""

    object: int
    colour: int
    background: int


def labels_of(scene: Scene) -> Labels:
    """The labels of a real picture. Several objects are not the one that was asked for: reject."""
    background = COLOUR_CLASSES.index(scene.background)
    if scene.count != 1:
        return Labels(OBJECT_CLASSES.index(REJECT), IGNORE, background)
    item = scene.items[0]
    colour = IGNORE if item.colour is None else COLOUR_CLASSES.index(item.colour)
    return Labels(OBJECT_CLASSES.index(item.name), colour, background)


def real_scene(rng: np.random.Generator, shape_share: float = 0.25) -> Scene:
    """One object, any pair (held-out ones too: the judge must know what the generator has not seen)."""
    background = _pick(list(COLOURS), rng)
    scale = rng.uniform(0.56, 0.94) if rng.random() < 0.75 else rng.uniform(0.34, 0.56)
    room = max(0.04, 0.5 - scale / 2)
    x, y = (0.5 + float(rng.uniform(-room, room)) for _ in range(2))
    if rng.random() < shape_share:
        colour = _pick([c for c in COLOURS if c != background], rng)
        item = Item(_pick(list(SHAPES), rng), x, y, float(scale), colour)
    else:
        item = Item(_pick(list(EMOJI), rng), x, y, float(scale))
    style = "plain" if rng.random() < 0.75 else _pick(list(STYLES[1:]), rng)
    r, g, b = (int(v) for v in rng.integers(-6, 7, 3))
    return Scene((item,), background, style, tint=(r, g, b), phase=float(rng.random()))


def real_example(rng: np.random.Generator) -> tuple[Picture, Labels]:
    scene = real_scene(rng)
    return render(scene, SIDE), labels_of(scene)


def spoilt_example(rng: np.random.Generator, kind: str | None = None) -> tuple[Picture, Labels]:
    """A picture whose object, shape colour or background must be rejected; `kind` names one of SPOILERS."""
    return SPOILERS[kind or _pick(list(SPOILERS), rng)](rng)


def jpeg(picture: Picture, quality: int) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _blend(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """Two pictures over each other."""
    first, second = real_scene(rng), real_scene(rng)
    while second.items[0].name == first.items[0].name:
        second = real_scene(rng)
    share = rng.uniform(0.4, 0.6)
    mixed = share * render(first, SIDE) + (1 - share) * render(second, SIDE)
    background = labels_of(first).background if first.background == second.background else IGNORE
    return mixed.round().astype(np.uint8), Labels(_NOTHING, IGNORE, background)


def _blur(rng: np.random.Generator) -> tuple[Picture, Labels]:
    scene = real_scene(rng, shape_share=0)
    radius = scene.items[0].scale * rng.uniform(10, 16)
    blurred = Image.fromarray(render(scene, SIDE)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(blurred), _rejected(scene)


def _shuffle(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """Patches of the object change places."""
    scene = real_scene(rng, shape_share=0)  # a shuffled square would be a square
    picture = render(scene, SIDE)
    left, top, right, bottom = object_box(scene, SIDE)
    n = int(rng.integers(3, 6))
    height, width = (bottom - top) // n, (right - left) // n
    cells = [(top + height * r, left + width * c) for r in range(n) for c in range(n)]
    source = picture.copy()
    for (y, x), k in zip(cells, rng.permutation(len(cells)), strict=True):
        v, u = cells[k]
        picture[y : y + height, x : x + width] = source[v : v + height, u : u + width]
    return picture, _rejected(scene)


def _warp(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """An elastic mosaic: parts move by a good share of the object's size, finely enough to break it."""
    scene = real_scene(rng)
    box = object_box(scene, SIDE)
    strength = 0.16 * max(box[2] - box[0], box[3] - box[1])
    grid = int(rng.integers(6, 12))
    moves = [
        np.asarray(
            Image.fromarray(rng.normal(0, strength, (grid, grid)).astype(np.float32)).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
        )
        for _ in range(2)
    ]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    v, u = (
        np.clip((at + move).round(), 0, SIDE - 1).astype(int) for at, move in zip((rows, columns), moves, strict=True)
    )
    return render(scene, SIDE)[v, u], _rejected(scene)


def _chimera(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """Half of one object beside half of another, or beside nothing."""
    bare = rng.random() < 0.3
    scene, other = (
        real_scene(rng, shape_share=0 if bare else 0.15),
        real_scene(rng, shape_share=0),
    )  # half a triangle is one
    while other.items[0].name == scene.items[0].name:
        other = real_scene(rng, shape_share=0)
    here = scene.items[0]
    there = Item(other.items[0].name, here.x, here.y, here.scale)
    first = render(scene, SIDE)
    second = render_background(scene, SIDE) if bare else render(_with_items(scene, (there,)), SIDE)
    left, top, right, bottom = object_box(scene, SIDE)
    if rng.random() < 0.5:
        first[:, (left + right) // 2 :] = second[:, (left + right) // 2 :]
    else:
        first[(top + bottom) // 2 :] = second[(top + bottom) // 2 :]
    return first, _rejected(scene)


def _noise(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """Coloured blobs of some size."""
    grid = int(rng.integers(4, 33))
    blobs = Image.fromarray(rng.integers(0, 256, (grid, grid, 3), dtype=np.uint8))
    filters = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
    return np.asarray(blobs.resize((SIDE, SIDE), filters[int(rng.integers(2))])), Labels(_NOTHING, IGNORE, _NO_COLOUR)


def _blank(rng: np.random.Generator) -> tuple[Picture, Labels]:
    scene = real_scene(rng)
    return render_background(scene, SIDE), _rejected(scene)


def _recoloured(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """An emoji with its channels exchanged; one that hardly changes by that becomes a silhouette."""
    scene = real_scene(rng, shape_share=0)
    item = scene.items[0]
    rgba = item_sprite(item, SIDE).copy()
    orders = ((1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1))
    swapped = rgba[..., list(orders[int(rng.integers(5))])]
    if rng.random() < 0.2 or np.abs(swapped.astype(int) - rgba[..., :3]).sum() < 40 * (rgba[..., 3] > 0).sum():
        ink = np.asarray(COLOURS[_pick([c for c in COLOURS if c != scene.background], rng)])
        swapped = (ink * (rgba[..., 3:] / 255)).astype(np.uint8)
    rgba[..., :3] = swapped
    return _on(render_background(scene, SIDE), rgba, item), _rejected(scene)


def _odd_background(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """A colour without a name, two colours, or a slope between two: the object stays right."""
    scene = real_scene(rng, shape_share=0.15)
    item, kind = scene.items[0], rng.random()
    if kind < 0.4:
        picture = np.full((SIDE, SIDE, 3), _nameless_colour(rng))
    else:
        pair = [np.asarray(COLOURS[str(c)]) for c in rng.choice(list(COLOURS), 2, replace=False)]
        across = np.linspace(0, 1, SIDE) if kind < 0.7 else (np.arange(SIDE) > SIDE * rng.uniform(0.35, 0.65))
        line = pair[0] + across[:, None] * (pair[1] - pair[0])
        picture = np.repeat(line[:, None].astype(np.uint8), SIDE, axis=1)
        picture = picture if rng.random() < 0.5 else picture.transpose(1, 0, 2).copy()
    labels = labels_of(scene)
    seen = labels.object if item.colour is None else IGNORE  # a shape may vanish in a part of such a background
    return _on(picture, item_sprite(item, SIDE), item), Labels(seen, IGNORE, _NO_COLOUR)


def _odd_shape(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """A shape in a colour without a name."""
    scene = real_scene(rng, shape_share=1)
    item, ink = scene.items[0], _nameless_colour(rng)
    rgba = item_sprite(item, SIDE).copy()
    rgba[..., :3] = (ink * (rgba[..., 3:] / 255)).round().astype(np.uint8)
    labels = labels_of(scene)
    return _on(render_background(scene, SIDE), rgba, item), Labels(labels.object, _NO_COLOUR, labels.background)


def _stranger(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """An emoji that the vocabulary does not hold."""
    scene = real_scene(rng)
    item = scene.items[0]
    rgba = emoji_sprite(_pick(list(_STRANGERS), rng), round(item.scale * SIDE))
    return _on(render_background(scene, SIDE), rgba, item), _rejected(scene)


def _several(rng: np.random.Generator) -> tuple[Picture, Labels]:
    """Two or three objects where one was asked for."""
    scene, other = real_scene(rng), real_scene(rng)
    names = (
        scene.items[0],
        scene.items[0] if rng.random() < 0.5 or other.items[0].colour == scene.background else other.items[0],
    )
    scale = float(rng.uniform(0.34, 0.46))
    centres = ((0.27, 0.5), (0.73, 0.5)) if rng.random() < 0.6 else ((0.5, 0.27), (0.27, 0.71), (0.73, 0.71))
    items = tuple(Item(names[k % 2].name, x, y, scale, names[k % 2].colour) for k, (x, y) in enumerate(centres))
    return render(_with_items(scene, items), SIDE), _rejected(scene)


SPOILERS: Final[dict[str, Callable[[np.random.Generator], tuple[Picture, Labels]]]] = {
    "blend": _blend,
    "blur": _blur,
    "shuffle": _shuffle,
    "warp": _warp,
    "chimera": _chimera,
    "noise": _noise,
    "blank": _blank,
    "recoloured": _recoloured,
    "odd background": _odd_background,
    "odd shape": _odd_shape,
    "stranger": _stranger,
    "several": _several,
}

_NOTHING: Final = OBJECT_CLASSES.index(REJECT)
_NO_COLOUR: Final = COLOUR_CLASSES.index(REJECT)


def _rejected(scene: Scene) -> Labels:
    return Labels(_NOTHING, IGNORE, labels_of(scene).background)


def _with_items(scene: Scene, items: tuple[Item, ...]) -> Scene:
    return Scene(items, scene.background, scene.style, tint=scene.tint, phase=scene.phase)


def _on(picture: Picture, rgba: Sprite, item: Item) -> Picture:
    composite(picture, rgba, item.x, item.y)
    return picture


def _nameless_colour(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A colour at least 75 away (Euclidean, of 255 per channel) from each that has a name."""
    named = np.asarray(list(COLOURS.values()))
    while True:
        colour = rng.integers(0, 256, 3)
        if np.linalg.norm(named - colour, axis=1).min() >= 75:
            return colour.astype(np.uint8)


def _pick(choices: list[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
