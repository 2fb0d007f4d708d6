"""The denoising UNet epsilon_theta(z_t, t, tau(y)) of LDM with cross-attention (Rombach et al. 2022, section 3.3).

One interface serves training, `render` and the engine:
`embed` (depends on t alone), `project_context` (on the text alone), `denoise` (the rest); `forward` composes the three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, KeyValue, SpatialTransformer
from models.config import UNetConfig
from models.layers import Downsample, ResnetBlock, TimestepMLP, Upsample, expand_rows, timestep_embedding


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(
        in_channels, out_channels, groups=config.norm_num_groups, eps=config.norm_eps, time_dim=config.time_embed_dim
    )


def _transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads[level],
        config.cross_attention_dim,
        depth=config.transformer_layers_per_block,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
    )


class DownBlock(nn.Module):
    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        sources = [widths[max(level - 1, 0)]] + [widths[level]] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(_resnet(config, source, widths[level]) for source in sources)
        cross = config.down_block_types[level] == "CrossAttnDownBlock2D"
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in sources if cross)
        last = level == len(widths) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(widths[level], asymmetric=False)])

    def forward(self, h: Tensor, emb: Tensor, kvs: Iterator[KeyValue], skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            h = resnet(h, emb)
            if self.attentions:
                h = self.attentions[index](h, kvs)
            skips.append(h)
        for downsampler in self.downsamplers:
            h = downsampler(h)
            skips.append(h)
        return h


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_transformer(config, len(config.block_out_channels) - 1)])

    def forward(self, h: Tensor, emb: Tensor, kvs: Iterator[KeyValue]) -> Tensor:
        h = self.attentions[0](self.resnets[0](h, emb), kvs)
        out: Tensor = self.resnets[1](h, emb)
        return out


class UpBlock(nn.Module):
    """`level` counts as in the down path; blocks run from the deepest level up."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        layers = config.layers_per_block + 1
        deeper = widths[min(level + 1, len(widths) - 1)]
        shallower = widths[max(level - 1, 0)]
        sources = [
            (deeper if j == 0 else widths[level], shallower if j == layers - 1 else widths[level])
            for j in range(layers)
        ]
        self.resnets = nn.ModuleList(_resnet(config, h + skip, widths[level]) for h, skip in sources)
        cross = config.up_block_types[len(widths) - 1 - level] == "CrossAttnUpBlock2D"
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in sources if cross)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(widths[level])])

    def forward(self, h: Tensor, emb: Tensor, kvs: Iterator[KeyValue], skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, expand_rows(skips.pop(), h.shape[0])], dim=1), emb)
            if self.attentions:
                h = self.attentions[index](h, kvs)
        for upsampler in self.upsamplers:
            # The next skip's size, so that odd sizes come back as they went down.
            height, width = skips[-1].shape[-2:]
            h = upsampler(h, (height, width))
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
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Timesteps t [P] in [0, T), class labels [P] where the structure has them -> [P, E].

        Raises ValueError when labels are given to a structure without class embedding, or missing for one with it.
        """
        if (labels is None) != (self.class_embedding is None):
            expected = "none" if self.class_embedding is None else "one per row"
            raise ValueError(f"class labels: this UNet expects {expected}")
        emb = self.embed_time(t)
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(labels)
        return emb

    def embed_time(self, t: Tensor) -> Tensor:
        """What `embed` has in common for all labels, [P, E]: the engine keeps it as a table over all T."""
        sinusoids = timestep_embedding(t, self.config.block_out_channels[0])
        emb: Tensor = self.time_embedding(sinusoids.to(self.conv_in.weight.dtype))
        return emb

    def _text_attentions(self) -> Iterator[Attention]:
        """In the order in which `denoise` meets them: down, middle, up."""
        for part in (self.down_blocks, self.mid_block, self.up_blocks):
            for module in part.modules():
                if isinstance(module, SpatialTransformer):
                    for block in module.transformer_blocks:
                        attention = block.attn2
                        assert isinstance(attention, Attention)
                        yield attention

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Text tokens [kP, L, D] -> keys and values [kP, heads, L, d] of every text attention; once per picture."""
        return [attention.project(context) for attention in self._text_attentions()]

    def denoise(self, x: Tensor, emb: Tensor, kv: Sequence[KeyValue]) -> Tensor:
        """x [P, Cin, H, W], emb [P, E], kv of kP rows ordered [unconditional P | conditional P] -> [kP, Cout, H, W].

        What comes before the first text attention runs on P rows.
        """
        kvs = iter(kv)
        h = self.conv_in(x)
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

    def forward(self, x: Tensor, t: Tensor, context: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.denoise(x, self.embed(t, labels), self.project_context(context))
