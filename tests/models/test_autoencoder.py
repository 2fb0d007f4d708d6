"""The first stages of all published structures against diffusers' `AutoencoderKL` and `VQModel`."""

import pytest
import torch
from torch import nn

from models.autoencoder import Autoencoder, Codebook, Posterior
from models.config import AutoencoderConfig
from tests.models.small import KL_F4, KL_F8, randomise, theirs
from tests.models.structures import AUTOENCODERS

ONE_GROUP = AutoencoderConfig(block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=1)
STRUCTURES = {**AUTOENCODERS, "one layer, one group": ONE_GROUP}
every_structure = pytest.mark.parametrize("name", STRUCTURES)
TOLERANCE = 5e-5


def autoencoder_of(config: AutoencoderConfig) -> Autoencoder:
    autoencoder = Autoencoder(config)
    randomise(autoencoder, even=True)
    return autoencoder


def pixels_for(config: AutoencoderConfig) -> torch.Tensor:
    """Two pictures, 2 x 3 latents each, more of them where f is small."""
    f = max(config.downsampling_factor, 4)
    return torch.rand(2, 3, 2 * f, 3 * f, generator=torch.Generator().manual_seed(5)) * 2 - 1


@every_structure
def test_encode_and_decode_are_those_of_diffusers(name: str) -> None:
    config = STRUCTURES[name]
    ours = autoencoder_of(config)
    oracle, pixels = theirs(ours), pixels_for(config)
    posterior = ours.encode(pixels)
    f = config.downsampling_factor
    assert posterior.mean.shape == (2, config.latent_channels, pixels.shape[2] // f, pixels.shape[3] // f)
    with torch.no_grad():
        encoded = oracle.encode(pixels)
        if config.codebook_size is None:
            expected = encoded.latent_dist
            torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(posterior.kl(), expected.kl(), rtol=1e-4, atol=0)
            mean = expected.mean
        else:
            mean = encoded.latents
        latents = torch.randn(2, config.latent_channels, 5, 4, generator=torch.Generator().manual_seed(6))
        decoded = oracle.decode(latents).sample
    torch.testing.assert_close(posterior.mean, mean, rtol=0, atol=TOLERANCE)
    assert decoded.std() > 0.1
    assert margin(ours, latents) > TOLERANCE
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=0, atol=TOLERANCE)


def margin(autoencoder: Autoencoder, latents: torch.Tensor) -> float:
    """How much farther than the nearest code the second nearest is, at least; without a codebook none is near."""
    if autoencoder.quantize is None:
        return float("inf")
    pixels = latents.movedim(1, -1).flatten(0, -2)
    nearest = torch.cdist(pixels, autoencoder.quantize.embedding.weight).sort(dim=1).values
    return (nearest[:, 1] - nearest[:, 0]).min().item()


@every_structure
def test_a_wrong_epsilon_would_show(name: str) -> None:
    """In any kind of norm, in any structure: what these tests are worth."""
    autoencoder = autoencoder_of(STRUCTURES[name])
    pixels = pixels_for(autoencoder.config)
    latents = torch.randn(1, autoencoder.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(6))
    encoded, decoded = autoencoder.encode(pixels).mean, autoencoder.decode(latents)
    kinds: dict[str, list[nn.GroupNorm]] = {}
    for path, module in autoencoder.named_modules():
        if isinstance(module, nn.GroupNorm):
            kinds.setdefault(path.partition(".")[0] + path.rpartition(".")[2], []).append(module)
    for kind, norms in kinds.items():
        for norm in norms:
            norm.eps = 1e-5
        changed = (
            autoencoder.encode(pixels).mean - encoded
            if kind.startswith("encoder")
            else autoencoder.decode(latents) - decoded
        )
        assert changed.abs().max() > 2 * TOLERANCE
        for norm in norms:
            norm.eps = 1e-6


def test_latents_of_a_codebook_are_those_before_quantising() -> None:
    vq = autoencoder_of(AUTOENCODERS["vq_f4"])
    posterior = vq.encode(torch.rand(1, 3, 16, 16) * 2 - 1)
    assert posterior.deterministic
    assert torch.equal(posterior.sample(torch.randn(posterior.mean.shape)), posterior.mean)
    assert vq.quantize is not None
    quantised = vq.quantize(posterior.mean)
    assert (quantised - posterior.mean).abs().max() > 0.01
    assert torch.equal(vq.decode(posterior.mean), vq.decode(quantised))


def test_the_nearest_code_is_found_in_parts_and_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(50, 3).requires_grad_(False)
    codebook.embedding.weight.copy_(torch.randn(50, 3, generator=generator))
    latents = torch.randn(2, 3, 40, 30, generator=generator)  # more pixels than are taken at a time
    assert latents[:, 0].numel() > 2 * Codebook.PIXELS
    distances = (latents[:, None] - codebook.embedding.weight[None, :, :, None, None]).norm(dim=2)
    assert torch.equal(codebook.nearest(latents), distances.argmin(dim=1))
    codebook.embedding.weight[7], codebook.embedding.weight[8] = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0005]])
    near = torch.tensor([1.0, 2.0, 3.0004]).view(1, 3, 1, 1)
    assert codebook.nearest(near).item() == 8
    assert codebook(near).dtype == torch.float32


def test_log_variances_are_clamped() -> None:
    autoencoder = autoencoder_of(KL_F4)
    assert isinstance(autoencoder.quant_conv, nn.Conv2d)
    autoencoder.quant_conv.weight.mul_(1000.0)
    logvar = autoencoder.encode(torch.rand(1, 3, 32, 32)).logvar
    assert (logvar.min().item(), logvar.max().item()) == (-30.0, 20.0)


def test_a_sample_is_the_mean_and_so_many_deviations() -> None:
    posterior = Posterior(torch.tensor([[1.0]]), torch.tensor([[2.0]]).log() * 2)
    assert posterior.sample(torch.tensor([[-0.5]])).item() == pytest.approx(0.0, abs=1e-6)


def test_f_is_a_power_of_two_by_levels() -> None:
    factors = {name: config.downsampling_factor for name, config in AUTOENCODERS.items() if name.startswith("kl_f")}
    assert factors == {"kl_f8": 8, "kl_f4": 4, "kl_f4_x4": 4, "kl_f1": 1, "kl_f2": 2, "kl_f16": 16, "kl_f32": 32}
    assert KL_F8.downsampling_factor == 8
