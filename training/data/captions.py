"""Scene to caption, from a small grammar. The plain form is by far the most frequent one."""

from typing import Final

import numpy as np

from training.data.scenes import Item, Scene
from training.data.vocabulary import COUNT_WORDS, plural

_FORMS: Final = (
    (0.60, "{things} on {ground}"),
    (0.12, "{bare}, {bare_ground}"),
    (0.06, "{things} on {short_ground}"),
    (0.05, "{things}, {bare_ground}"),
    (0.05, "{bare} on {ground}"),
    (0.03, "{ground} with {things}"),
    (0.03, "{things} in front of {ground}"),
    (0.03, "a picture of {things} on {ground}"),
    (0.02, "{bare}"),
    (0.01, "{things}"),
)
_SHARES: Final = np.asarray([share for share, _ in _FORMS])
_SIZE_WORDS: Final = {"small": ("small", "small", "tiny", "little"), "big": ("big", "large", "big", "huge")}


def plain_caption(scene: Scene) -> str:
    """The most frequent form, e.g. "a pizza on a blue background"."""
    return _fill(_FORMS[0][1], scene, scene.size, _place(scene, 0))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    form = _FORMS[int(rng.choice(len(_FORMS), p=_SHARES / _SHARES.sum()))][1]
    size = None
    if scene.size is not None:
        words = _SIZE_WORDS[scene.size]
        size = words[int(rng.integers(len(words)))]
    elif scene.position is not None and rng.random() < 0.5:
        size = "small"  # placed objects are smaller than usual, whether the caption says so or not
    return _fill(form, scene, size, _place(scene, int(rng.integers(4))))


def _fill(form: str, scene: Scene, size: str | None, place: str) -> str:
    style = "" if scene.style == "plain" else scene.style + " "
    bare_ground = f"{style}{scene.background} background"
    return form.format(
        things=_things(scene, size, articles=True) + place,
        bare=_things(scene, size, articles=False) + place,
        ground=_with_article(bare_ground),
        bare_ground=bare_ground,
        short_ground=style + scene.background,
    )


def _place(scene: Scene, form: int) -> str:
    if scene.position is None:
        return ""
    at = f" {'on' if scene.position in ('left', 'right') else 'at'} the {scene.position}"
    corner = f" in the {scene.position} corner" if " " in scene.position else at
    return (at, at, corner, f", {scene.position}")[form]


def _things(scene: Scene, size: str | None, articles: bool) -> str:
    first = scene.items[0]
    if scene.count > 1 and len({(item.name, item.colour) for item in scene.items}) == 1:
        return f"{COUNT_WORDS[scene.count]} {_noun(first, size, plural(first.name))}"
    nouns = [_noun(item, size, item.name) for item in scene.items]
    return " and ".join(_with_article(noun) if articles else noun for noun in nouns)


def _noun(item: Item, size: str | None, noun: str) -> str:
    return " ".join(word for word in (size, item.colour, noun) if word)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
