"""Rendering, and datasets on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from training.data import (
    COLOURS,
    EMOJI,
    STYLES,
    Item,
    PictureDataset,
    Scene,
    generate,
    object_box,
    object_boxes,
    plain_scene,
    render,
    write_dataset,
)


@pytest.mark.parametrize("name", EMOJI)
def test_an_emoji_leaves_no_dark_halo(name: str) -> None:
    """On a bright background, pixels just outside the object are never darker than both object and background allow."""
    scene = Scene((Item(name, 0.5, 0.5, 0.7),), "white")
    white, black = (render(Scene(scene.items, colour), 128).astype(int) for colour in ("white", "black"))
    barely_covered = (white - black > 170) & (white - black < 228)  # 228: no object at all
    assert (white[barely_covered] > 120).all()


def test_pictures_of_any_size_show_the_same_scene() -> None:
    scene = plain_scene("panda", "green", np.random.default_rng(1))
    small, large = render(scene, 128), render(scene, 256)
    assert small.shape == (128, 128, 3)
    assert small.dtype == np.uint8
    halved = large.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 5  # sprites have whole sizes in pixels


def test_the_background_is_its_colour_and_patterns_vary_it() -> None:
    for style in STYLES:
        picture = render(Scene((Item("pig", 0.5, 0.5, 0.3),), "blue", style), 128)
        corner = picture[:24, :24].reshape(-1, 3)
        assert np.abs(corner.mean(axis=0) - COLOURS["blue"]).max() < 56
        assert (len(np.unique(corner, axis=0)) == 1) == (style == "plain")


def test_the_box_holds_the_object_and_nothing_outside_it_changes() -> None:
    rng = np.random.default_rng(2)
    for name in ("octopus", "banana"):
        scene = plain_scene(name, "yellow", rng)
        left, top, right, bottom = object_box(scene, 128)
        changed = (render(scene, 128) != render(Scene((Item("cat", 9, 9, 0.1),), "yellow", tint=scene.tint), 128)).any(
            2
        )
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert abs(rows[0] - top) <= 1
        assert abs(rows[-1] + 1 - bottom) <= 1
        assert abs(columns[0] - left) <= 1
        assert abs(columns[-1] + 1 - right) <= 1


def test_an_object_over_the_edge_is_cut_off() -> None:
    scene = Scene((Item("pizza", 0.0, 1.0, 0.5),), "blue")
    assert object_boxes(scene, 128)[0][0] == 0
    assert object_boxes(scene, 128)[0][3] == 128
    assert render(scene, 128).shape == (128, 128, 3)


def test_generation_depends_on_seed_and_number_only() -> None:
    pictures, captions, _ = generate(6, 11, 64)
    tail, tail_captions, _ = generate(2, 11, 64, start=4)
    assert (pictures[4:] == tail).all()
    assert captions[4:] == tail_captions
    assert (generate(6, 12, 64)[0] != pictures).any()


def test_a_dataset_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.dataset.SHARD_SIZE", 8)
    write_dataset(tmp_path, 20, 3, 32)
    whole = PictureDataset(tmp_path)
    expected, captions, scenes = generate(20, 3, 32)
    assert len(whole) == 20
    assert whole.captions == captions
    assert (whole.pictures(range(20)) == expected).all()
    assert whole.scene(17) == scenes[17]
    assert tuple(whole.boxes[5]) == object_box(scenes[5], 32)

    (tmp_path / "captions-00001.json").unlink()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        PictureDataset(tmp_path)
    kept = (tmp_path / "pictures-00000.npy").stat().st_mtime_ns
    write_dataset(tmp_path, 20, 3, 32)
    assert (PictureDataset(tmp_path).pictures(range(20)) == expected).all()
    assert (tmp_path / "pictures-00000.npy").stat().st_mtime_ns == kept


def test_processes_write_the_same_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", 10, 4, 32, processes=1)
    write_dataset(tmp_path / "two", 10, 4, 32, processes=2)
    for name in ("pictures-00000.npy", "captions-00000.json", "boxes-00000.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_dataset_in_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"n": 5}))
    with pytest.raises(ValueError, match="choose another folder"):
        write_dataset(tmp_path, 20, 3, 32)
    with pytest.raises(FileNotFoundError, match="holds no dataset"):
        PictureDataset(tmp_path / "nothing")
