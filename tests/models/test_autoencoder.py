"""The first stage against diffusers' `AutoencoderKL`."""

import dataclasses

import pytest
import torch

from models.autoencoder import Autoencoder, Posterior
from models.config import AutoencoderConfig
from tests.models.small import KL_F4, KL_F8, diffusers, randomise

STRUCTURES = {
    "f8": KL_F8,
    "f4, other norm groups": dataclasses.replace(KL_F4, norm_num_groups=1),
    "f4 without attention in the middle": dataclasses.replace(KL_F4, mid_block_add_attention=False),
    "f2, two layers": AutoencoderConfig(block_out_channels=(4, 6), norm_num_groups=2, latent_channels=3),
}


@pytest.mark.parametrize("size", [(16, 24), (40, 8)], ids=str)
@pytest.mark.parametrize("config", STRUCTURES.values(), ids=STRUCTURES)
def test_encode_and_decode_are_those_of_diffusers(config: AutoencoderConfig, size: tuple[int, int]) -> None:
    ours = Autoencoder(config)
    randomise(ours)
    theirs = diffusers.AutoencoderKL.from_config(config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict())  # strict: the parameters have the same names
    pixels = torch.rand(2, 3, *size) * 2 - 1
    posterior = ours.encode(pixels)
    with torch.no_grad():
        expected = theirs.encode(pixels).latent_dist
        decoded = theirs.decode(expected.mean).sample
    f = config.downsampling_factor
    assert posterior.mean.shape == (2, config.latent_channels, size[0] // f, size[1] // f)
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=5e-6)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=5e-6)
    torch.testing.assert_close(posterior.kl(), expected.kl(), rtol=1e-5, atol=0)
    assert decoded.std() > 0.1
    torch.testing.assert_close(ours.decode(posterior.mean), decoded, rtol=0, atol=2e-5)


def test_log_variances_are_clamped() -> None:
    autoencoder = Autoencoder(KL_F4)
    randomise(autoencoder)
    autoencoder.quant_conv.weight.mul_(1000.0)
    logvar = autoencoder.encode(torch.rand(1, 3, 32, 32)).logvar
    assert (logvar.min().item(), logvar.max().item()) == (-30.0, 20.0)


def test_a_sample_is_the_mean_and_so_many_deviations() -> None:
    posterior = Posterior(torch.tensor([[1.0]]), torch.tensor([[2.0]]).log() * 2)
    assert posterior.sample(torch.tensor([[-0.5]])).item() == pytest.approx(0.0, abs=1e-6)
