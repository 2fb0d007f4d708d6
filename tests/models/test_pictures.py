"""Pictures to tensors and back, against diffusers' `VaeImageProcessor`."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from models.pictures import pad_to_multiple, to_image, to_mask, to_pixels


@pytest.fixture(scope="module")
def every_level() -> Image.Image:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return Image.fromarray(np.stack([levels, levels.T, 255 - levels], axis=-1), "RGB")


def test_pixels_are_those_of_diffusers(every_level: Image.Image) -> None:
    pixels = to_pixels(every_level)
    assert pixels.shape == (1, 3, 16, 16)
    assert (pixels.min().item(), pixels.max().item()) == (-1.0, 1.0)
    assert torch.equal(pixels, VaeImageProcessor().preprocess(every_level))


def test_pictures_survive_both_ways(every_level: Image.Image) -> None:
    assert np.array_equal(np.asarray(to_image(to_pixels(every_level))), np.asarray(every_level))


def test_levels_are_clamped_and_rounded_as_in_diffusers() -> None:
    pixels = torch.cat([torch.linspace(-1.2, 1.2, 3 * 64).view(1, 3, 8, 8), torch.rand(1, 3, 8, 8) * 2 - 1], dim=2)
    (expected,) = VaeImageProcessor().postprocess(pixels)
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(expected))


def test_transparent_and_grey_pictures_become_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        assert to_pixels(Image.new(mode, (3, 2))).shape == (1, 3, 2, 3)


def test_masks_repaint_from_the_middle_up() -> None:
    levels = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8), "L")
    assert to_mask(levels).tolist() == [[[[0.0, 0.0, 1.0, 1.0]]]]
    theirs = VaeImageProcessor(
        vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    ).preprocess(levels)
    assert torch.equal(to_mask(levels), theirs)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_padding_repeats_the_right_and_bottom_edge(mode: str) -> None:
    size = (5, 9, 3) if mode == "RGB" else (5, 9)
    array = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    padded = np.asarray(pad_to_multiple(Image.fromarray(array, mode), 8))
    assert padded.shape[:2] == (8, 16)
    assert np.array_equal(padded[:5, :9], array)
    assert (padded[:5, 9:] == array[:, -1:]).all()
    assert (padded[5:] == padded[4:5]).all()


def test_whole_multiples_are_left_alone() -> None:
    image = Image.new("RGB", (16, 8))
    assert pad_to_multiple(image, 8) is image
