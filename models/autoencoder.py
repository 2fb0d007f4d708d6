"""First stage: pixels <-> latents, KL-regularised (Rombach et al. 2022, section 3.1 and appendix G).

Pixels are [N, 3, H, W] in [-1, 1]; latents are [N, z, H/f, W/f]. *Scaled* latents (times `scaling_factor`, about unit
variance) are what diffusion works on; `encode` and `decode` speak unscaled ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.config import AutoencoderConfig
from models.layers import Downsample, ResnetBlock, Upsample

EPS = 1e-6  # every norm of the published autoencoders


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z|x): mean and log-variance, each [N, z, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, noise of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) summed over each picture, [N]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


def _resnet(config: AutoencoderConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=config.norm_num_groups, eps=EPS, time_dim=None)


class PixelAttention(Attention):
    """Single-head self-attention of the middle block, with its own norm and residual, on [N, C, H, W]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor, kv: object = None) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        return x + super().forward(tokens).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        attention = [PixelAttention(width, config.norm_num_groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attention)

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        out: Tensor = self.resnets[1](h)
        return out


class EncoderBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig, level: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        sources = [widths[max(level - 1, 0)]] + [widths[level]] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(_resnet(config, source, widths[level]) for source in sources)
        last = level == len(widths) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(widths[level], asymmetric=True)])

    def forward(self, h: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers):
            h = module(h)
        return h


class DecoderBlock(nn.Module):
    """`level` counts as in the encoder; blocks run from the deepest level up."""

    def __init__(self, config: AutoencoderConfig, level: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        sources = [widths[min(level + 1, len(widths) - 1)]] + [widths[level]] * config.layers_per_block
        self.resnets = nn.ModuleList(_resnet(config, source, widths[level]) for source in sources)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(widths[level])])

    def forward(self, h: Tensor) -> Tensor:
        for module in (*self.resnets, *self.upsamplers):
            h = module(h)
        return h


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(EncoderBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(DecoderBlock(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Posterior:
        """Pixels in [-1, 1], sides multiples of f -> posterior over unscaled latents; logvar clamped to [-30, 20]."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents -> pixels, about [-1, 1] (not clamped)."""
        out: Tensor = self.decoder(self.post_quant_conv(latents))
        return out
