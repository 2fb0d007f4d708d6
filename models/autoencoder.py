"""First stage: pixels <-> latents, KL-regularised or with a codebook (Rombach et al. 2022, section 3.1, appendix G).

Pixels are [N, 3, H, W] in [-1, 1]; latents are [N, z, H/f, W/f]. *Scaled* latents (times `scaling_factor`, about unit
variance) are what diffusion works on; `encode` and `decode` speak unscaled ones. With a codebook the latents are those
before quantising, which is the decoder's first step (section 3.1: the quantisation is absorbed by the decoder).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import PixelAttention
from models.config import AutoencoderConfig
from models.layers import Downsample, ResnetBlock, Upsample

EPS = 1e-6  # every norm of the published autoencoders


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z|x): mean and log-variance, each [N, z, h, w]. A `deterministic` one is its mean alone."""

    mean: Tensor
    logvar: Tensor
    deterministic: bool = False

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, noise of the mean's shape."""
        return self.mean if self.deterministic else self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) summed over each picture, [N]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


def _resnet(config: AutoencoderConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=config.norm_num_groups, eps=EPS, time_dim=None)


def _attention(config: AutoencoderConfig, channels: int) -> PixelAttention:
    return PixelAttention(channels, heads=1, groups=config.norm_num_groups, eps=EPS)


def _layers(config: AutoencoderConfig, level: int, sources: Iterable[int]) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Residual blocks of a level, and the attention that follows each, if any."""
    width = config.block_out_channels[level]
    resnets = [_resnet(config, source, width) for source in sources]
    attentions = [_attention(config, width) for _ in resnets if level in config.attention_levels]
    return nn.ModuleList(resnets), nn.ModuleList(attentions)


def _run(resnets: nn.ModuleList, attentions: nn.ModuleList, h: Tensor) -> Tensor:
    for index, resnet in enumerate(resnets):
        h = resnet(h)
        if attentions:
            h = attentions[index](h)
    return h


class MidBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, width)] if config.mid_block_add_attention else [])

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
        self.resnets, self.attentions = _layers(config, level, sources)
        last = level == len(widths) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(widths[level], asymmetric=True)])

    def forward(self, h: Tensor) -> Tensor:
        h = _run(self.resnets, self.attentions, h)
        for downsampler in self.downsamplers:
            h = downsampler(h)
        return h


class DecoderBlock(nn.Module):
    """`level` counts as in the encoder; blocks run from the deepest level up."""

    def __init__(self, config: AutoencoderConfig, level: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        sources = [widths[min(level + 1, len(widths) - 1)]] + [widths[level]] * config.layers_per_block
        self.resnets, self.attentions = _layers(config, level, sources)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(widths[level])])

    def forward(self, h: Tensor) -> Tensor:
        h = _run(self.resnets, self.attentions, h)
        for upsampler in self.upsamplers:
            h = upsampler(h)
        return h


def _moments(config: AutoencoderConfig) -> int:
    """Channels that the encoder puts out: means and log-variances, with a codebook the latents alone."""
    return config.latent_channels if config.codebook_size is not None else 2 * config.latent_channels


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(EncoderBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], _moments(config), 3, padding=1)

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


class Codebook(nn.Module):
    """`embedding.weight` [K, z] are the codes; they stay in fp32, as the search for the nearest one does."""

    PIXELS = 1024
    """So many at a time, which bounds the table of distances."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)

    def nearest(self, latents: Tensor) -> Tensor:
        """[N, z, h, w] -> indices [N, h, w]."""
        pixels = latents.movedim(1, -1).flatten(0, -2).float()  # [Nhw, z]
        codes = self.embedding.weight.float()
        # Not by matrix products, which would lose digits where codes are close.
        exact = "donot_use_mm_for_euclid_dist"
        parts = [
            torch.cdist(part, codes, compute_mode=exact).argmin(dim=1) for part in torch.split(pixels, self.PIXELS)
        ]
        return torch.cat(parts).view(latents.shape[0], *latents.shape[2:])

    def forward(self, latents: Tensor) -> Tensor:
        """Every pixel's nearest code in its place, in fp32."""
        codes: Tensor = self.embedding(self.nearest(latents))
        return codes.movedim(-1, 1).contiguous()  # norms lose digits where channels come last


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        z, moments, codes = config.latent_channels, _moments(config), config.codebook_size
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()
        self.quantize = Codebook(codes, z) if codes is not None else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, pixels: Tensor) -> Posterior:
        """Pixels in [-1, 1], sides multiples of f -> posterior over unscaled latents; logvar clamped to [-30, 20]."""
        moments = self.quant_conv(self.encoder(pixels))
        if self.quantize is not None:
            return Posterior(moments, torch.full_like(moments, -30.0), deterministic=True)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents, best in fp32 -> pixels, about [-1, 1] (not clamped), in the dtype of the weights."""
        if self.quantize is not None:
            latents = self.quantize(latents)
        out: Tensor = self.decoder(self.post_quant_conv(latents.to(self.decoder.conv_in.weight.dtype)))
        return out
