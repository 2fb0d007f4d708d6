"""What the UNet sees beside the latents at every step: masks and masked pictures, semantic maps, small pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.autoencoder import Posterior
from models.pictures import pad_to_multiple

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion

BlankPosterior = Callable[[int, int], Posterior]
"""As `LatentDiffusion.blank_posterior`."""


def small_mask(model: LatentDiffusion, mask: Tensor) -> Tensor:
    """Mask [1, 1, H, W] at the size of the latents, by the nearest neighbour."""
    f = model.autoencoder.config.downsampling_factor
    height, width = mask.shape[-2:]
    return F.interpolate(mask, size=(height // f, width // f), mode="nearest")


def mask_and_picture(model: LatentDiffusion, pixels: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """What an inpainting UNet sees of a picture [1, 3, H, W] whose `mask` [1, 1, H, W] is 1 where to repaint.

    With text as RunwayML has it: [mask 0 or 1, scaled latents of the picture with a grey hole]. Without, as LDM has it:
    [unscaled latents of the picture with a black hole, mask -1 or 1].
    """
    small = small_mask(model, mask)
    if model.conditioner is not None:
        return torch.cat([small, model.scaled_sample(model.posterior(pixels * (mask < 0.5)), generator)], dim=1)
    holed = torch.where(mask < 0.5, pixels, -1.0)
    return torch.cat([model.posterior(holed).mean, 2.0 * small - 1.0], dim=1)


def blank_mask_and_picture(model: LatentDiffusion, blank: Posterior, generator: torch.Generator) -> Tensor:
    """`mask_and_picture` of no picture, all of it to be repainted: so an inpainting model paints after words alone."""
    latents = model.scaled_sample(blank, generator)
    return torch.cat([torch.ones_like(latents[:, :1]), latents], dim=1)


def semantic_map(model: LatentDiffusion, image: Image.Image) -> Tensor:
    """Picture of class numbers -> [1, c, h, w]: one channel per class, halved log2(f) times, mapped to c channels
    (LDM's SpatialRescaler). Raises ValueError for a class that the model does not know.

    Mapping one-hot pixels is looking them up, and may as well come before averaging them: nothing of all classes at
    full size is ever made.
    """
    convolution = model.semantic
    assert convolution is not None
    f = model.autoencoder.config.downsampling_factor
    labels = torch.from_numpy(np.array(pad_to_multiple(image.convert("L"), f), dtype=np.int64))
    if int(labels.max()) >= convolution.in_channels:
        raise ValueError(f"semantic_map has class {int(labels.max())}; expected 0 to {convolution.in_channels - 1}")
    columns = convolution.weight.detach().float().cpu().flatten(1)  # [c, classes]
    if convolution.bias is not None:
        columns = columns + convolution.bias.detach().float().cpu()[:, None]
    mapped = columns[:, labels][None]
    while f > 1:
        mapped = F.interpolate(mapped, scale_factor=0.5, mode="bilinear")
        f //= 2
    return mapped
