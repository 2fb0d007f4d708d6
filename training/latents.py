"""Latents computed once: diffusion trains on what the frozen autoencoder makes of the pictures (LDM, section 3.1)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from models.autoencoder import Autoencoder
from training.autoencoder import to_tensor
from training.data import PictureDataset
from training.masks import draw_mask

_BATCH = 64


@dataclasses.dataclass(frozen=True)
class LatentDataset:
    """Scaled latents [n, z, h, w] fp16 with their captions.

    `masks` [m, 1, h, w] (1 = repaint) and `masked` [m, z, h, w] belong to the first m pictures; `blank` [z, h, w] are
    the latents of a picture that is masked everywhere.
    """

    latents: Tensor
    captions: list[str]
    masks: Tensor
    masked: Tensor
    blank: Tensor

    @property
    def all_masked(self) -> Tensor:
        """[1 + z, h, w]: mask and masked latents of a picture that is to be painted whole."""
        return torch.cat([torch.ones(1, *self.blank.shape[1:]), self.blank.float()])


@torch.no_grad()
def encode(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """Pixels [N, 3, H, W] in [-1, 1] -> means of the posterior, scaled, fp16."""
    with torch.autocast("cpu", torch.bfloat16):
        mean = autoencoder.encode(pixels).mean
    return (mean.float() * autoencoder.config.scaling_factor).half()


def _batches(data: PictureDataset, n: int, title: str) -> Iterator[tuple[range, Tensor]]:
    for start in track(range(0, n, _BATCH), description=title):
        rows = range(start, min(start + _BATCH, n))
        yield rows, to_tensor(data.pictures(list(rows)))


def write_latents(autoencoder: Autoencoder, data: PictureDataset, out: Path, n: int, masked: int, seed: int) -> None:
    """Encode the first `n` pictures, and the first `masked` of them again with a hole, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    f = autoencoder.config.downsampling_factor
    side = data.manifest.side
    parts = [encode(autoencoder, pixels) for _, pixels in _batches(data, n, "latents")]
    masks, holes = [], []
    for rows, pixels in _batches(data, masked, "masked latents"):
        drawn = np.stack([draw_mask(side, data.boxes[i], np.random.default_rng((seed, i))) for i in rows])
        mask = torch.from_numpy(drawn)[:, None].float()
        masks.append(F.interpolate(mask, size=(side // f, side // f), mode="nearest").half())
        holes.append(encode(autoencoder, pixels * (mask < 0.5)))
    blank = encode(autoencoder, torch.zeros(1, 3, side, side))
    arrays = {"latents": parts, "masks": masks, "masked": holes, "blank": [blank]}
    for name, tensors in arrays.items():
        np.save(out / f"{name}.npy", torch.cat(tensors).numpy())
    (out / "captions.json").write_text(json.dumps(data.captions[:n]), encoding="utf-8")


def read_latents(folder: Path) -> LatentDataset:
    """What `write_latents` wrote; raises FileNotFoundError for a folder without it."""

    def load(name: str) -> Tensor:
        array: npt.NDArray[np.float16] = np.load(folder / f"{name}.npy")
        return torch.from_numpy(array)

    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return LatentDataset(load("latents"), captions, load("masks"), load("masked"), load("blank")[0])
