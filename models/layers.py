"""Building blocks shared by UNet and autoencoder; named as the diffusers parameters, so weights load as they are."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def expand_rows(x: Tensor, rows: int) -> Tensor:
    """Repeat x [P, ...] to [rows, ...] as [all P | all P | ...]; a no-op when it has that many rows already.

    Guided lanes run [unconditional P | conditional P]; what does not depend on the text is computed once on P.
    """
    if x.shape[0] == rows:
        return x
    return torch.cat([x] * (rows // x.shape[0]))  # unlike `repeat` it keeps a channels-last order of memory


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of t [N] as [N, dim], fp32, cosines first (DDPM's position code in the order of guided diffusion)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """[N, in] -> [N, out]: linear, SiLU, linear."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


Resample = Literal["down", "up"]


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, and a 1x1 shortcut where widths differ.

    The time embedding shifts what comes in between, with `scale_shift` after scaling it (Dhariwal & Nichol 2021,
    section 3). A block with `resample` halves or doubles the map before its first conv, and its residual alike.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_dim: int | None,
        scale_shift: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        time_channels = 2 * out_channels if scale_shift else out_channels
        self.time_emb_proj = nn.Linear(time_dim, time_channels) if time_dim is not None else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """x [N, Cin, H, W], emb [N or N/k, E] -> [N, Cout, H', W']; one that doubles does so to `size` if given."""
        h: Tensor = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = resample(h, self.resample, size), resample(x, self.resample, size)
        h = self.conv1(h)
        if self.time_emb_proj is not None and emb is not None:
            time = expand_rows(self.time_emb_proj(F.silu(emb)), x.shape[0])[:, :, None, None]
            if self.scale_shift:
                scale, shift = time.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + time)
        else:
            h = self.norm2(h)
        h = self.conv2(F.silu(h))
        shortcut: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h


def resample(x: Tensor, how: Resample, size: tuple[int, int] | None = None) -> Tensor:
    """Means of 2x2 pixels, or every pixel twice in each direction, or to `size`."""
    if how == "down":
        out: Tensor = F.avg_pool2d(x, 2)
        return out
    scale = 2.0 if size is None else None
    doubled: Tensor = F.interpolate(x, size=size, scale_factor=scale, mode="nearest")
    return doubled


class Downsample(nn.Module):
    """Stride-2 conv; the UNet pads 1 on every side, the autoencoder pads right and bottom only."""

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Called as a ResnetBlock that halves; takes no part of `emb`."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, or to `size`, then a 3x3 conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Called as a ResnetBlock that doubles; takes no part of `emb`."""
        out: Tensor = self.conv(resample(x, "up", size))
        return out
