"""First stage (Rombach et al. 2022, section 3.1): L1 reconstruction with a small KL penalty towards N(0, I)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig
from models.layers import ResnetBlock
from training.adversarial import AdversarialAutoencoder
from training.data import PictureDataset
from training.loop import LoopSettings, train

SMALL = AutoencoderConfig(block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=2, sample_size=128)
"""f = 8: latents of darkroom-small."""

SMALL_X4 = AutoencoderConfig(block_out_channels=(16, 48, 96), layers_per_block=1, norm_num_groups=2, sample_size=128)
"""f = 4: latents of darkroom-small-x4, as large as its low-resolution input."""


@dataclasses.dataclass(frozen=True)
class AutoencoderSettings:
    """`crop` pixels a side until `whole_from` (share of the steps), then whole pictures, as norms see them in use.

    `kl_weight` multiplies the mean KL of a latent element. `adversarial_from` is the share of the steps after which a
    patch discriminator joins in; None trains without one, and a run keeps the choice that it began with.
    """

    batch: int = 16
    crop: int = 64
    whole_from: float = 0.6
    kl_weight: float = 1e-4
    adversarial_from: float | None = None


def reconstruction_loss(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """L1 on pixels, on 4x4 means (flat colours) and on differences of neighbours (edges)."""
    error = reconstruction - pixels
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return error.abs().mean() + F.avg_pool2d(error, 4).abs().mean() + across + down


def to_tensor(pictures: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _draw(data: PictureDataset, batch: int, side: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(data), (batch,), generator=generator)
    pixels = to_tensor(data.pictures(chosen.numpy()))
    whole = pixels.shape[-1]
    if side == whole:
        return pixels
    corners = torch.randint(whole - side + 1, (batch, 2), generator=generator).tolist()
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(pixels, corners, strict=True)])


def train_autoencoder(
    data_folder: Path,
    folder: Path,
    config: AutoencoderConfig,
    loop: LoopSettings,
    settings: AutoencoderSettings = AutoencoderSettings(),
) -> Autoencoder:
    """Train (or resume) in `folder`; back come the averaged weights, `scaling_factor` set to 1 / std of the latents."""
    data = PictureDataset(data_folder)
    whole = data.manifest.side
    torch.manual_seed(loop.seed)

    def loss_fn(module: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        autoencoder = module.autoencoder if isinstance(module, AdversarialAutoencoder) else module
        assert isinstance(autoencoder, Autoencoder)
        late = step >= settings.whole_from * loop.steps
        batch = max(settings.batch * settings.crop**2 // whole**2, 1) if late else settings.batch
        pixels = _draw(data, batch, whole if late else settings.crop, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = autoencoder.encode(pixels)
            noise = torch.randn(posterior.mean.shape, generator=generator)
            reconstruction = autoencoder.decode(posterior.sample(noise))
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        l1 = reconstruction_loss(reconstruction.float(), pixels)
        losses = {"loss": l1 + settings.kl_weight * kl, "l1": l1, "kl": kl}
        if isinstance(module, AdversarialAutoencoder):
            return module.add_losses(losses, pixels, reconstruction.float(), active=step >= adversarial_step)
        return losses

    start = initialise(Autoencoder(config))
    adversarial = settings.adversarial_from is not None
    adversarial_step = int((settings.adversarial_from or 0.0) * loop.steps)
    title = f"autoencoder f={config.downsampling_factor}"
    trained = train(AdversarialAutoencoder(start) if adversarial else start, loss_fn, loop, folder, title)
    if isinstance(trained, AdversarialAutoencoder):
        trained = trained.autoencoder
    assert isinstance(trained, Autoencoder)
    return with_unit_latents(trained, data)


@torch.no_grad()
def initialise(autoencoder: Autoencoder) -> Autoencoder:
    """Variance-preserving convolutions, near-identity residual blocks, and latents of little noise (log-variance -6).

    PyTorch's own start shrinks the signal at every convolution, so that at first the decoder sees its biases and the
    posterior's noise: after 240 steps the loss was 0.80 that way and 0.37 this way.
    """
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in autoencoder.modules():
        if isinstance(module, ResnetBlock):
            module.conv2.weight.mul_(0.1)
    assert isinstance(autoencoder.quant_conv, nn.Conv2d)
    assert autoencoder.quant_conv.bias is not None
    autoencoder.quant_conv.bias[autoencoder.config.latent_channels :] = -6.0
    return autoencoder


@torch.no_grad()
def with_unit_latents(autoencoder: Autoencoder, data: PictureDataset, pictures: int = 512) -> Autoencoder:
    """The same weights with the `scaling_factor` that gives latents unit variance (Rombach et al. 2022, appendix G)."""
    latents = []
    for start in range(0, min(pictures, len(data)), 32):
        pixels = to_tensor(data.pictures(np.arange(start, min(start + 32, len(data)))))
        latents.append(autoencoder.encode(pixels).mean)
    config = dataclasses.replace(autoencoder.config, scaling_factor=round(1.0 / float(torch.cat(latents).std()), 5))
    scaled = Autoencoder(config)
    scaled.load_state_dict(autoencoder.state_dict())
    return scaled.eval().requires_grad_(False)
