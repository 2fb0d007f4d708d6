"""The judge: its examples, its network, its file, and the frozen one's own score."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.data import COLOURS, Item, Scene
from training.judge import COLOUR_CLASSES, OBJECT_CLASSES, REJECT, Judge, load_judge, to_input
from training.judge_examples import IGNORE, SPOILERS, labels_of, real_example, spoilt_example
from training.judge_training import augment, save_judge, score_judge, train_judge

REJECTED = OBJECT_CLASSES.index(REJECT)
FROZEN = Path(__file__).parents[2] / "weights" / "judge"


@pytest.mark.parametrize("kind", SPOILERS)
def test_every_way_to_spoil_rejects_something(kind: str) -> None:
    for number in range(30):
        picture, labels = spoilt_example(np.random.default_rng(number), kind)
        again, _ = spoilt_example(np.random.default_rng(number), kind)
        assert picture.shape == (128, 128, 3)
        assert picture.dtype == np.uint8
        assert (picture == again).all()
        assert labels.object == REJECTED or COLOUR_CLASSES.index(REJECT) in (labels.colour, labels.background)


def test_real_examples_are_labelled_with_what_they_show() -> None:
    star, cat = Item("star", 0.5, 0.5, 0.5, "red"), Item("cat", 0.5, 0.5, 0.5)
    labels = labels_of(Scene((star,), "blue"))
    assert (OBJECT_CLASSES[labels.object], COLOUR_CLASSES[labels.colour]) == ("star", "red")
    assert list(COLOURS)[labels.background] == "blue"
    assert labels_of(Scene((cat,), "blue")).colour == IGNORE
    assert labels_of(Scene((cat, star), "blue")).object == REJECTED


def test_input_is_averaged_to_64_pixels() -> None:
    picture, _ = real_example(np.random.default_rng(0))
    x = to_input(picture[None])
    assert x.shape == (1, 3, 64, 64)
    assert x[0, :, 5, 9].tolist() == pytest.approx((picture[10:12, 18:20].mean(axis=(0, 1)) / 127.5 - 1).tolist())
    with pytest.raises(ValueError, match="multiple of 64"):
        to_input(np.zeros((1, 100, 100, 3), dtype=np.uint8))


def test_augmented_pictures_stay_in_range() -> None:
    torch.manual_seed(0)
    x = augment(torch.rand(4, 3, 64, 64) * 2 - 1)
    assert x.shape == (4, 3, 64, 64)
    assert x.abs().max() <= 1


def test_training_is_repeatable_and_its_file_loads(tmp_path: Path) -> None:
    first, second = train_judge(2, batch=4), train_judge(2, batch=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    save_judge(first, tmp_path, {})
    assert (tmp_path / "judge.safetensors").stat().st_size < 1.5e6
    loaded = load_judge(tmp_path)
    picture, _ = real_example(np.random.default_rng(0))
    torch.testing.assert_close(loaded(to_input(picture[None])), first(to_input(picture[None])), atol=0.02, rtol=0.02)


def test_a_judge_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save_judge(Judge(), tmp_path, {"object_classes": ["stapler"]})
    with pytest.raises(ValueError, match="train it anew"):
        load_judge(tmp_path)


def test_the_frozen_judge_knows_real_pictures_and_rejects_spoilt_ones() -> None:
    scores = score_judge(load_judge(FROZEN), real=300, per_spoiler=40, seed=77)
    for condition in ("clean", "augmented"):
        shares = scores[condition]
        assert isinstance(shares, dict)
        assert min(shares["object"], shares["shape colour"], shares["background"]) >= 0.97, (condition, shares)
    rejected = scores["rejected"]
    assert isinstance(rejected, dict)
    assert min(rejected.values()) > 0.8, rejected
    assert sum(rejected.values()) / len(rejected) > 0.93
