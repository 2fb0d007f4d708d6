"""Between Pillow images and tensors: uint8 [0, 255] <-> pixels [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(image: Image.Image) -> Tensor:
    """RGB picture -> [1, 3, H, W] fp32 in [-1, 1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array / 255.0).permute(2, 0, 1)[None] * 2.0 - 1.0


def to_mask(mask: Image.Image) -> Tensor:
    """Grey picture -> [1, 1, H, W] fp32 of 0 (keep) and 1 (repaint); repaint where the value is at least 128."""
    array = np.asarray(mask.convert("L"), dtype=np.float32)
    return (torch.from_numpy(array / 255.0)[None, None] >= 0.5).float()


def to_image(pixels: Tensor) -> Image.Image:
    """[1, 3, H, W] in about [-1, 1] -> RGB picture, clamped and rounded to the nearest level as diffusers does."""
    array = (pixels[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((array * 255).round().astype(np.uint8), "RGB")


def pad_to_multiple(image: Image.Image, multiple: int) -> Image.Image:
    """Repeat the right and bottom edge until both sides are multiples; the picture itself where they are."""
    width, height = (-(-side // multiple) * multiple for side in image.size)
    if (width, height) == image.size:
        return image
    array = np.asarray(image)
    pad = ((0, height - image.height), (0, width - image.width)) + ((0, 0),) * (array.ndim - 2)
    return Image.fromarray(np.pad(array, pad, mode="edge"), image.mode)
