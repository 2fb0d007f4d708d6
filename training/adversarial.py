"""Optional part of the first stage: a patch discriminator with hinge loss and adaptive weight.

Rombach et al. 2022, appendix G, after Esser et al. 2021 (VQGAN), section 3.1, eq. 6 and 7.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from models.autoencoder import Autoencoder

GAN_WEIGHT: Final = 0.5
"""Multiplies the adaptive weight (`disc_weight` of the published autoencoders)."""


class PatchDiscriminator(nn.Module):
    """Isola et al. 2017, with two strided layers: pixels [N, 3, H, W] -> logits [N, 1, H/4 - 2, W/4 - 2].

    Positive means real; each logit sees 34x34 pixels. Group norm, since batches of whole pictures hold a few rows.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, padding=1, bias=False),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, padding=1),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.layers(pixels)
        return logits


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Of the discriminator; 1 where it knows nothing (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, gan_loss: Tensor, last_layer: Tensor) -> Tensor:
    """|grad L_rec| / (|grad L_GAN| + 1e-4) at the decoder's last layer, at most 1e4 (Esser et al. 2021, eq. 7)."""
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(gan_loss, last_layer, retain_graph=True)
    ratio: Tensor = wanted.norm() / (given.norm() + 1e-4)
    return ratio.clamp(max=1e4)


class AdversarialAutoencoder(nn.Module):
    """Both networks as one module, so that one loop, one optimiser and one saved state serve them.

    AdamW treats each parameter alone, so this equals two optimisers at one learning rate, as long as no loss reaches
    the other network's parameters; only the gradient's norm is clipped over both.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.discriminator = PatchDiscriminator()

    def add_losses(
        self, losses: dict[str, Tensor], pixels: Tensor, reconstruction: Tensor, *, active: bool
    ) -> dict[str, Tensor]:
        """The `losses` with the two new ones, also in "loss". Inactive ones are 0, so that a log keeps its columns."""
        if not active:
            zero = torch.zeros(())
            return {**losses, "gan": zero, "discriminator": zero, "gan_weight": zero}
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        gan = -functional_call(self.discriminator, frozen, (reconstruction,)).mean()
        weight = GAN_WEIGHT * adaptive_weight(losses["l1"], gan, self.autoencoder.decoder.conv_out.weight)
        discriminator = hinge_loss(self.discriminator(pixels), self.discriminator(reconstruction.detach()))
        total = losses["loss"] + weight * gan + discriminator
        return {**losses, "loss": total, "gan": gan, "discriminator": discriminator, "gan_weight": weight}
