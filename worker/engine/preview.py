"""Latents as a small picture without the decoder: one linear map from latent channels to RGB."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.pictures import to_image

_SAMPLES = 4
_SIDE = 8


class LatentPreview:
    """`weights` [z + 1, 3]: RGB in [-1, 1] per latent pixel, the last row constant."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    @classmethod
    @torch.no_grad()
    def fit(cls, model: LatentDiffusion) -> LatentPreview:
        """Least squares between a few smooth random latents and what the decoder makes of them, shrunk to that size."""
        channels = model.autoencoder.config.latent_channels
        coarse = torch.randn(_SAMPLES, channels, 3, 3, generator=torch.Generator().manual_seed(0))
        latents = F.interpolate(coarse, size=(_SIDE, _SIDE), mode="bilinear", align_corners=True)
        pixels = torch.cat([model.decode_latents(one[None]).float().cpu() for one in latents])
        small = F.interpolate(pixels, size=(_SIDE, _SIDE), mode="area")
        targets = small.permute(0, 2, 3, 1).flatten(0, 2)  # [samples * side^2, 3]
        return cls(torch.linalg.lstsq(_with_constant(latents), targets).solution)

    def draw(self, latents: Tensor) -> Image.Image:
        """Scaled latents [1, z, h, w] -> picture of w x h pixels."""
        rgb = _with_constant(latents.float().cpu()) @ self.weights
        rgb = rgb.nan_to_num(0.0, 1.0, -1.0)  # of a row that is about to fail
        return to_image(rgb.T.reshape(1, 3, *latents.shape[-2:]))


def _with_constant(latents: Tensor) -> Tensor:
    """[N, z, h, w] -> [N * h * w, z + 1]."""
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([flat, flat.new_ones(flat.shape[0], 1)], dim=1)
