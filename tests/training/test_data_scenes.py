"""The distribution of scenes, their captions, and the pairs held out."""

from collections import Counter

import numpy as np
import pytest

from training.data import (
    COLOURS,
    EMOJI,
    SHAPES,
    Item,
    Scene,
    example,
    held_out_pairs,
    is_held_out,
    plain_caption,
    plain_scene,
    seen_pairs,
)

EXAMPLES = [example(5, index) for index in range(3000)]


def test_the_held_out_pairs_never_change() -> None:
    assert len(EMOJI) == 24
    assert len(SHAPES) == 6
    assert len(held_out_pairs()) == 21
    assert held_out_pairs()[:3] == [("pizza", "orange"), ("panda", "gray"), ("pig", "black")]
    assert len(seen_pairs()) + 21 == 240


def test_no_example_shows_a_held_out_pair_or_a_shape_in_the_colour_of_its_background() -> None:
    for scene, _ in EXAMPLES:
        for item in scene.items:
            assert not is_held_out(item.name, scene.background)
            assert item.colour != scene.background


def test_every_object_and_colour_remains_in_training() -> None:
    assert {name for name, _ in seen_pairs()} == set(EMOJI)
    assert {item.name for scene, _ in EXAMPLES for item in scene.items} == {*EMOJI, *SHAPES}
    assert {scene.background for scene, _ in EXAMPLES} == set(COLOURS)


def test_seven_scenes_in_ten_are_plain_and_pairs_are_rare() -> None:
    plain = [s for s, _ in EXAMPLES if s.style == "plain" and s.count == 1 and not s.size and not s.position]
    pairs = [s for s, _ in EXAMPLES if len({(i.name, i.colour) for i in s.items}) == 2]
    assert 0.67 < len(plain) / len(EXAMPLES) < 0.73
    assert len(pairs) / len(EXAMPLES) < 0.05


def test_the_most_frequent_caption_is_the_plain_form() -> None:
    forms = Counter(text == plain_caption(scene) for scene, text in EXAMPLES)
    assert forms[True] / len(EXAMPLES) > 0.5


def test_captions_read_well() -> None:
    rng = np.random.default_rng(0)
    item = Item("heart", 0.3, 0.3, 0.4, "red")
    assert plain_caption(plain_scene("octopus", "orange", rng)) == "an octopus on an orange background"
    assert plain_caption(Scene((item, item), "blue")) == "two red hearts on a blue background"
    assert plain_caption(Scene((item,), "green", "striped", "small", "top left")) == (
        "a small red heart at the top left on a striped green background"
    )
    assert plain_caption(Scene((item, Item("cat", 0.7, 0.5, 0.4)), "blue")) == (
        "a red heart and a cat on a blue background"
    )


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="a shape needs a colour"):
        Item("star", 0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="cannot be seen"):
        Scene((Item("star", 0.5, 0.5, 0.5, "red"),), "red")
    with pytest.raises(ValueError, match="unknown object"):
        Item("stapler", 0.5, 0.5, 0.5)
