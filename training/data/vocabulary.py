"""Everything a caption can name: objects, shapes, colours, background styles, positions; and the pairs held out."""

import hashlib
from typing import Final

EMOJI: Final[dict[str, str]] = {
    "pizza": "\N{SLICE OF PIZZA}",
    "panda": "\N{PANDA FACE}",
    "pig": "\N{PIG FACE}",
    "cat": "\N{CAT FACE}",
    "frog": "\N{FROG FACE}",
    "fire": "\N{FIRE}",
    "mushroom": "\N{MUSHROOM}",
    "strawberry": "\N{STRAWBERRY}",
    "rocket": "\N{ROCKET}",
    "house": "\N{HOUSE BUILDING}",
    "tree": "\N{DECIDUOUS TREE}",
    "banana": "\N{BANANA}",
    "car": "\N{AUTOMOBILE}",
    "fish": "\N{FISH}",
    "octopus": "\N{OCTOPUS}",
    "ladybug": "\N{LADY BEETLE}",
    "snowman": "\N{SNOWMAN WITHOUT SNOW}",
    "sunflower": "\N{SUNFLOWER}",
    "ghost": "\N{GHOST}",
    "penguin": "\N{PENGUIN}",
    "eggplant": "\N{AUBERGINE}",
    "umbrella": "\N{UMBRELLA}",
    "donut": "\N{DOUGHNUT}",
    "pumpkin": "\N{JACK-O-LANTERN}",
}
"""Name in captions to the character drawn from the emoji font."""

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "diamond")
OBJECTS: Final = (*EMOJI, *SHAPES)

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (204, 32, 44),
    "orange": (245, 138, 36),
    "yellow": (250, 220, 70),
    "green": (46, 150, 70),
    "blue": (40, 98, 216),
    "purple": (126, 58, 178),
    "pink": (248, 150, 196),
    "gray": (130, 134, 140),
    "black": (20, 20, 24),
    "white": (248, 248, 248),
}
"""Colour word to sRGB; backgrounds and shapes share it, so that one word always means one colour."""

STYLES: Final = ("plain", "gradient", "striped", "dotted", "checkered")

POSITIONS: Final[dict[str, tuple[float, float]]] = {
    "top left": (0.27, 0.27),
    "top": (0.5, 0.27),
    "top right": (0.73, 0.27),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "bottom left": (0.27, 0.73),
    "bottom": (0.5, 0.73),
    "bottom right": (0.73, 0.73),
}
"""Position name to the object's centre (x, y), in fractions of the picture's side."""

COUNT_WORDS: Final = {2: "two", 3: "three"}
IRREGULAR_PLURALS: Final = {"fish": "fish", "strawberry": "strawberries", "octopus": "octopuses"}

_HELD_OUT_SHARE: Final = 0.08


def is_held_out(name: str, background: str) -> bool:
    """Whether the pair never occurs in training data. A hash decides, so the answer never changes."""
    if name not in EMOJI:
        return False
    digest = hashlib.sha256(f"{name} on {background}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT_SHARE * 2**32


def held_out_pairs() -> list[tuple[str, str]]:
    """(emoji name, background colour) of every pair kept away from training."""
    return [(name, colour) for name in EMOJI for colour in COLOURS if is_held_out(name, colour)]


def seen_pairs() -> list[tuple[str, str]]:
    """(emoji name, background colour) of every pair that training may show."""
    return [(name, colour) for name in EMOJI for colour in COLOURS if not is_held_out(name, colour)]


def plural(name: str) -> str:
    return IRREGULAR_PLURALS.get(name, name + "s")
