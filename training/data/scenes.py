"""What a picture shows, as plain data, and how scenes are drawn at random."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from training.data.vocabulary import COLOURS, EMOJI, POSITIONS, SHAPES, STYLES, is_held_out

_SHAPE_SHARE: Final = 0.22
_KINDS: Final = ("plain", "styled", "sized", "placed", "counted", "paired")
_KIND_SHARES: Final = (0.70, 0.07, 0.08, 0.08, 0.04, 0.03)
_STYLED_AMONG_OTHERS: Final = 0.1

_PLAIN_SCALE: Final = (0.66, 0.78)
_SIZE_SCALES: Final = {"small": (0.34, 0.42), "big": (0.84, 0.92)}
_PLACED_SCALE: Final = (0.38, 0.46)
_COUNT_SCALES: Final = {2: (0.38, 0.44), 3: (0.36, 0.40)}
_COUNT_CENTRES: Final = {2: ((0.27, 0.5), (0.73, 0.5)), 3: ((0.5, 0.27), (0.27, 0.71), (0.73, 0.71))}
_JITTER: Final = 0.03
_TINT: Final = 5.0


@dataclass(frozen=True)
class Item:
    """One object. `x`, `y` (its centre) and `scale` (its longest side) are fractions of the picture's side."""

    name: str
    x: float
    y: float
    scale: float
    colour: str | None = None  # shapes only; an emoji brings its own

    def __post_init__(self) -> None:
        if self.name not in EMOJI and self.name not in SHAPES:
            raise ValueError(f"unknown object {self.name!r}; expected one of {[*EMOJI, *SHAPES]}")
        if (self.name in SHAPES) != (self.colour is not None):
            raise ValueError(f"{self.name!r} with colour {self.colour!r}: a shape needs a colour, an emoji takes none")


@dataclass(frozen=True)
class Scene:
    """One picture. `size`, `position` hold the words a caption may use; where things are is in `items`."""

    items: tuple[Item, ...]
    background: str
    style: str = "plain"
    size: str | None = None
    position: str | None = None
    tint: tuple[int, int, int] = (0, 0, 0)  # added to the background's colour
    phase: float = 0.0  # where a pattern starts, in periods

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"unknown background style {self.style!r}; expected one of {STYLES}")
        if self.background not in COLOURS:
            raise ValueError(f"unknown background colour {self.background!r}; expected one of {list(COLOURS)}")
        if any(item.colour == self.background for item in self.items):
            raise ValueError(f"a {self.background} shape on a {self.background} background cannot be seen")

    @property
    def count(self) -> int:
        return len(self.items)


def plain_scene(
    name: str, background: str, rng: np.random.Generator, colour: str | None = None, style: str = "plain"
) -> Scene:
    """One object of usual size near the centre."""
    item = _item((name, colour), (0.5, 0.5), _PLAIN_SCALE, rng)
    return _scene((item,), background, style, rng)


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene of the training distribution: about 70 % plain, never a held-out pair."""
    kind = _KINDS[int(rng.choice(len(_KINDS), p=_KIND_SHARES))]
    style = "plain"
    if kind == "styled" or (kind != "plain" and rng.random() < _STYLED_AMONG_OTHERS):
        style = STYLES[int(rng.integers(1, len(STYLES)))]
    first = _draw_object(rng)
    second = _draw_object(rng) if kind == "paired" else first
    background = _draw_background([first, second], rng)
    if kind in ("plain", "styled"):
        return plain_scene(first[0], background, rng, first[1], style)
    if kind == "sized":
        size = "small" if rng.random() < 0.6 else "big"
        return _scene((_item(first, (0.5, 0.5), _SIZE_SCALES[size], rng),), background, style, rng, size=size)
    if kind == "placed":
        position = list(POSITIONS)[int(rng.integers(len(POSITIONS)))]
        item = _item(first, POSITIONS[position], _PLACED_SCALE, rng)
        return _scene((item,), background, style, rng, position=position)
    count = 2 if kind == "paired" or rng.random() < 0.6 else 3
    scale = _uniform(_COUNT_SCALES[count], rng)  # the same for all, or a reader would call one of them small
    objects = (first, second) if kind == "paired" else (first,) * count
    placed = zip(objects, _COUNT_CENTRES[count], strict=True)
    return _scene(tuple(_item(o, centre, (scale, scale), rng) for o, centre in placed), background, style, rng)


def _draw_object(rng: np.random.Generator) -> tuple[str, str | None]:
    if rng.random() < _SHAPE_SHARE:
        return SHAPES[int(rng.integers(len(SHAPES)))], list(COLOURS)[int(rng.integers(len(COLOURS)))]
    return list(EMOJI)[int(rng.integers(len(EMOJI)))], None


def _draw_background(objects: list[tuple[str, str | None]], rng: np.random.Generator) -> str:
    allowed = [c for c in COLOURS if all(c != colour and not is_held_out(name, c) for name, colour in objects)]
    return allowed[int(rng.integers(len(allowed)))]


def _item(
    drawn: tuple[str, str | None], centre: tuple[float, float], scales: tuple[float, float], rng: np.random.Generator
) -> Item:
    name, colour = drawn
    x, y = (c + float(rng.uniform(-_JITTER, _JITTER)) for c in centre)
    return Item(name, x, y, _uniform(scales, rng), colour)


def _scene(
    items: tuple[Item, ...],
    background: str,
    style: str,
    rng: np.random.Generator,
    size: str | None = None,
    position: str | None = None,
) -> Scene:
    r, g, b = (int(v) for v in rng.uniform(-_TINT, _TINT, 3).round())
    return Scene(items, background, style, size, position, (r, g, b), float(rng.random()))


def _uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    return float(rng.uniform(*bounds))
