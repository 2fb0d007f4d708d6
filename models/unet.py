"""The denoising UNet epsilon_theta(z_t, t, tau(y)) of LDM (Rombach et al. 2022, section 3.3), with or without text.

One interface serves training, `render` and the engine:
`embed` (depends on t alone), `project_context` (on the text alone), `denoise` (the rest); `forward` composes the three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, KeyValue, PixelAttention, SpatialTransformer
from models.config import UNetConfig
from models.layers import Downsample, Resample, ResnetBlock, TimestepMLP, Upsample, expand_rows, timestep_embedding


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, resample: Resample | None = None) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        time_dim=config.time_embed_dim,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        resample=resample,
    )


def _transformer(config: UNetConfig, level: int, *, only_cross: bool) -> SpatialTransformer:
    assert config.cross_attention_dim is not None
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads[level],
        config.cross_attention_dim,
        depth=config.depths[level],
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        only_cross=only_cross,
        upcast=config.upcast_attention,
    )


def _attentions(config: UNetConfig, level: int, block_type: str, number: int) -> nn.ModuleList:
    """What follows each of `number` residual blocks; empty for types without attention."""
    if block_type.startswith("CrossAttn"):
        only_cross = config.only_cross[level]
        return nn.ModuleList(_transformer(config, level, only_cross=only_cross) for _ in range(number))
    if block_type.startswith("Attn"):
        width, heads = config.block_out_channels[level], config.heads[level]
        groups, eps = config.norm_num_groups, config.norm_eps
        return nn.ModuleList(PixelAttention(width, heads, groups=groups, eps=eps) for _ in range(number))
    return nn.ModuleList()


def _resamples_in_resnet(block_type: str, type_with_attention: str) -> bool:
    return block_type.startswith("Resnet") or (block_type.startswith("Attn") and type_with_attention == "resnet")


class DownBlock(nn.Module):
    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, block_type = config.block_out_channels, config.down_block_types[level]
        width = widths[level]
        sources = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(_resnet(config, source, width) for source in sources)
        self.attentions = _attentions(config, level, block_type, len(sources))
        self.downsamplers = nn.ModuleList()
        if level < len(widths) - 1:
            in_resnet = _resamples_in_resnet(block_type, config.downsample_type)
            half = _resnet(config, width, width, "down") if in_resnet else Downsample(width, asymmetric=False)
            self.downsamplers.append(half)

    def forward(self, h: Tensor, emb: Tensor, kvs: Iterator[KeyValue], skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            h = resnet(h, emb)
            if self.attentions:
                h = self.attentions[index](h, kvs)
            skips.append(h)
        for downsampler in self.downsamplers:
            h = downsampler(h, emb)
            skips.append(h)
        return h


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        level = len(config.block_out_channels) - 1
        width = config.block_out_channels[level]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList()
        if config.cross_attention_dim is not None:
            self.attentions.append(_transformer(config, level, only_cross=False))
        elif config.add_attention:
            groups, eps = config.middle_norm_groups, config.norm_eps
            self.attentions.append(PixelAttention(width, config.heads[level], groups=groups, eps=eps))

    def forward(self, h: Tensor, emb: Tensor, kvs: Iterator[KeyValue]) -> Tensor:
        h = self.resnets[0](h, emb)
        for attention in self.attentions:
            h = attention(h, kvs)
        out: Tensor = self.resnets[1](h, emb)
        return out


class UpBlock(nn.Module):
    """`level` counts as in the down path; blocks run from the deepest level up."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, block_type = config.block_out_channels, config.up_block_types[-1 - level]
        width = widths[level]
        layers = config.layers_per_block + 1
        deeper = widths[min(level + 1, len(widths) - 1)]
        shallower = widths[max(level - 1, 0)]
        sources = [(deeper if j == 0 else width) + (shallower if j == layers - 1 else width) for j in range(layers)]
        self.resnets = nn.ModuleList(_resnet(config, source, width) for source in sources)
        self.attentions = _attentions(config, level, block_type, layers)
        self.upsamplers = nn.ModuleList()
        if level > 0:
            in_resnet = _resamples_in_resnet(block_type, config.upsample_type)
            self.upsamplers.append(_resnet(config, width, width, "up") if in_resnet else Upsample(width))

    def forward(self, h: Tensor, emb: Tensor, kvs: Iterator[KeyValue], skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, expand_rows(skips.pop(), h.shape[0])], dim=1), emb)
            if self.attentions:
                h = self.attentions[index](h, kvs)
        for upsampler in self.upsamplers:
            # The next skip's size, so that odd sizes come back as they went down.
            height, width = skips[-1].shape[-2:]
            h = upsampler(h, emb, (height, width))
        return h


class UNet(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], config.time_embed_dim)
        labels = config.num_class_embeds
        self.class_embedding = nn.Embedding(labels, config.time_embed_dim) if labels is not None else None
        added = config.projection_class_embeddings_input_dim
        self.add_embedding = TimestepMLP(added, config.time_embed_dim) if added is not None else None
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def embed(self, t: Tensor, labels: Tensor | None = None, addition: Tensor | None = None) -> Tensor:
        """Timesteps t [P] in [0, T), class labels [P] and what `embed_addition` makes [kP, E], both where the structure
        has them -> [P, E], with an addition [kP, E].

        Raises ValueError for what is given to a structure without such an embedding, or missing for one with it.
        """
        for given, embedding, name in (
            (labels, self.class_embedding, "class labels"),
            (addition, self.add_embedding, "addition"),
        ):
            if (given is None) != (embedding is None):
                raise ValueError(f"{name}: this UNet expects {'none' if embedding is None else 'one per row'}")
        emb = self.embed_time(t)
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(labels)
        return emb if addition is None else expand_rows(emb, addition.shape[0]) + addition

    def embed_time(self, t: Tensor) -> Tensor:
        """What `embed` has in common for all labels, [P, E]: the engine keeps it as a table over all T."""
        sinusoids = timestep_embedding(t, self.config.block_out_channels[0])
        emb: Tensor = self.time_embedding(sinusoids.to(self.conv_in.weight.dtype))
        return emb

    def embed_addition(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """Pooled texts [kP, D], sizes [kP, 6] in pixels (see `config.unet.SIZES`) -> [kP, E], once per picture.

        Raises ValueError for a structure without such an embedding.
        """
        if self.add_embedding is None or self.config.addition_time_embed_dim is None:
            raise ValueError("pooled texts: this UNet expects none")
        sinusoids = timestep_embedding(sizes.flatten(), self.config.addition_time_embed_dim)
        features = torch.cat([pooled, sinusoids.reshape(len(sizes), -1)], dim=-1)
        emb: Tensor = self.add_embedding(features.to(self.add_embedding.linear_1.weight.dtype))
        return emb

    def _text_attentions(self) -> Iterator[Attention]:
        """In the order in which `denoise` meets them: down, middle, up."""
        for part in (self.down_blocks, self.mid_block, self.up_blocks):
            for module in part.modules():
                if isinstance(module, SpatialTransformer):
                    yield from module.text_attentions

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Text tokens [kP, L, D] -> keys and values [kP, heads, L, d] of every text attention; once per picture."""
        return [attention.project(context) for attention in self._text_attentions()]

    def denoise(self, x: Tensor, emb: Tensor, kv: Sequence[KeyValue]) -> Tensor:
        """x [P, Cin, H, W], emb [P, E], kv of kP rows ordered [unconditional P | conditional P] -> [kP, Cout, H, W].

        What comes before the first text attention runs on P rows; without one, all does, and `kv` is empty. With an
        addition that differs between the k rows emb is [kP, E], and all runs on kP.
        """
        kvs = iter(kv)
        h = self.conv_in(x)
        if self.add_embedding is not None:
            h = expand_rows(h, emb.shape[0])
        skips = [h]
        for block in self.down_blocks:
            h = block(h, emb, kvs, skips)
        h = self.mid_block(h, emb, kvs)
        for block in self.up_blocks:
            h = block(h, emb, kvs, skips)
        return self.head(h)

    def head(self, h: Tensor) -> Tensor:
        """What comes after the blocks."""
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        labels: Tensor | None = None,
        addition: Tensor | None = None,
    ) -> Tensor:
        """`context` None for a structure without text attention."""
        kv = [] if context is None else self.project_context(context)
        return self.denoise(x, self.embed(t, labels, addition), kv)
