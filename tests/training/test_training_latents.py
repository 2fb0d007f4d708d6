"""Holes for inpainting, and latents on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig
from training.autoencoder import to_tensor
from training.data import PictureDataset
from training.latents import encode, read_latents, write_latents
from training.masks import draw_mask
from training.upscaler import shrink, write_upscaler_latents

TINY_F8 = AutoencoderConfig(
    block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.5, sample_size=64
)
TINY_F4 = AutoencoderConfig(block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, sample_size=64)


def tiny(config: AutoencoderConfig) -> Autoencoder:
    torch.manual_seed(7)
    return Autoencoder(config).eval().requires_grad_(False)


@pytest.mark.parametrize("box", [(20, 24, 44, 50), (0, 0, 12, 12), (50, 40, 64, 64)])
def test_masks_stay_within_the_picture_and_half_of_them_cover_the_object(box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    covering = 0
    for seed in range(300):
        mask = draw_mask(64, np.asarray(box, dtype=np.int16), np.random.default_rng(seed))
        assert mask.shape == (64, 64)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}
        assert 0.01 < mask.mean() < 0.9
        covering += bool(mask[top:bottom, left:right].all())
    assert covering >= 120


def test_latents_are_read_as_they_were_written(data: PictureDataset, tmp_path: Path) -> None:
    autoencoder = tiny(TINY_F8)
    write_latents(autoencoder, data, tmp_path, n=10, masked=4, seed=1)
    latents = read_latents(tmp_path)
    assert latents.captions == data.captions[:10]
    assert latents.latents.shape == (10, 4, 8, 8)
    assert latents.latents.dtype == torch.half
    pixels = to_tensor(data.pictures(range(10)))
    assert torch.equal(latents.latents, encode(autoencoder, pixels))
    assert latents.masks.shape == (4, 1, 8, 8)
    assert set(np.unique(latents.masks.numpy())) == {0.0, 1.0}
    mask = torch.from_numpy(draw_mask(64, data.boxes[2], np.random.default_rng((1, 2))))
    assert torch.equal(latents.masks[2, 0], mask[::8, ::8].half())
    expected = encode(autoencoder, pixels[2:3] * (mask < 0.5))
    assert torch.allclose(latents.masked[2:3].float(), expected.float(), atol=0.02)  # bf16, in another batch
    assert torch.equal(latents.all_masked, torch.cat([torch.ones(1, 8, 8), latents.blank.float()]))


def test_latents_are_scaled(data: PictureDataset) -> None:
    autoencoder = tiny(TINY_F8)
    pixels = to_tensor(data.pictures([0, 1]))
    assert float(pixels.min()) >= -1
    assert float(pixels.max()) <= 1
    mean = autoencoder.encode(pixels).mean
    assert torch.allclose(encode(autoencoder, pixels).float(), 0.5 * mean, atol=0.02)


def test_a_folder_without_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_latents(tmp_path)


def test_upscaler_latents_lie_beside_the_small_pictures(tmp_path: Path) -> None:
    write_upscaler_latents(tiny(TINY_F4), tmp_path, n=6, seed=3, side=64)
    small = np.load(tmp_path / "small.npy")
    assert small.shape == (6, 16, 16, 3)
    assert small.dtype == np.uint8
    assert np.load(tmp_path / "latents.npy").shape == (6, 4, 16, 16)
    assert (shrink(np.full((64, 32, 3), 77, dtype=np.uint8)) == 77).all()
