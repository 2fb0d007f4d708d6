"""The UNet of CompVis/latent-diffusion and Stable Diffusion as its authors laid it out: a tree of modules with their
names, so that its state_dict has the keys of published files. Written for tests, after checkpoint keys and papers."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


class ResBlock(nn.Module):
    def __init__(self, source: int, emb: int, width: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(norm(source), nn.SiLU(), nn.Conv2d(source, width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, width * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(norm(width), nn.SiLU(), nn.Dropout(0), nn.Conv2d(width, width, 3, padding=1))
        self.skip_connection = nn.Identity() if source == width else nn.Conv2d(source, width, 1)

    def resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[:2](x)))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        out: Tensor = self.skip_connection(self.resized(x)) + h
        return out


class AttentionBlock(nn.Module):
    """The rows of qkv: for each head its q, then its k, then its v."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, *size = x.shape
        flat = x.reshape(n, c, -1)
        rows = self.qkv(self.norm(flat)).reshape(n * self.heads, 3 * c // self.heads, -1)
        q, k, v = rows.split(c // self.heads, dim=1)  # each [n heads, width, L]
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(c / self.heads), dim=-1)
        h = torch.einsum("bts,bcs->bct", weights, v).reshape(n, c, -1)
        out: Tensor = (flat + self.proj_out(h)).reshape(n, c, *size)
        return out


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for rows in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        out: Tensor = self.to_out((weights @ v).transpose(1, 2).flatten(2))
        return out


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int, only_cross: bool) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.attn1 = CrossAttention(width, context if only_cross else width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.only_cross else h)
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int, depth: int, linear: bool, only_cross: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = norm(width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        blocks = [BasicTransformerBlock(width, context, heads, only_cross) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(-1, (height, width))
        out: Tensor = x + (h if self.linear else self.proj_out(h))
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _attention(width: int, heads: int, context: int | None, depth: int, linear: bool, crosses: bool) -> nn.Module:
    if context is None:
        return AttentionBlock(width, heads)
    return SpatialTransformer(width, context, heads, depth, linear, crosses)


def _label_embedding(classes: int | None, added: int | None, emb: int) -> nn.Module | None:
    if added is not None:
        return nn.Sequential(nn.Sequential(nn.Linear(added, emb), nn.SiLU(), nn.Linear(emb, emb)))
    return None if classes is None else nn.Embedding(classes, emb)


class UNetModel(nn.Module):
    """`attention` holds the factors of downsampling that have it; `only_cross` has one entry per level. `heads` is
    their number, else `head_width` their width. A `context` makes transformers of attention, `depth` blocks deep, one
    number or one per level. With `added`, a vector of this width is embedded beside the timestep."""

    def __init__(
        self,
        channels: tuple[int, int],
        base: int,
        multiples: tuple[int, ...],
        attention: Collection[int],
        *,
        heads: int | None = None,
        head_width: int = 32,
        context: int | None = None,
        depth: int | tuple[int, ...] = 1,
        linear: bool = False,
        only_cross: tuple[bool, ...] | None = None,
        updown: bool = False,
        scale_shift: bool = False,
        classes: int | None = None,
        added: int | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__()
        depths = depth if isinstance(depth, tuple) else (depth,) * len(multiples)
        crossing = only_cross or (False,) * len(multiples)
        self.base, emb = base, 4 * base
        self.time_embed = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb: Any = _label_embedding(classes, added, emb)

        def attend(width: int, level: int, crosses: bool) -> nn.Module:
            return _attention(width, heads or width // head_width, context, depths[level], linear, crosses)

        last = len(multiples) - 1
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels[0], base, 3, padding=1)])])
        width, skips, factor = base, [base], 1
        for level, multiple in enumerate(multiples):
            for _ in range(layers):
                block: list[nn.Module] = [ResBlock(width, emb, multiple * base, scale_shift)]
                width = multiple * base
                if factor in attention:
                    block.append(attend(width, level, crossing[level]))
                self.input_blocks.append(nn.ModuleList(block))
                skips.append(width)
            if level < last:
                down = ResBlock(width, emb, width, scale_shift, "down") if updown else Downsample(width)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(width)
                factor *= 2
        ends = [ResBlock(width, emb, width, scale_shift) for _ in range(2)]
        # The x4 upscaler's middle has self-attention, whatever its levels have.
        self.middle_block = nn.ModuleList([ends[0], attend(width, last, crosses=False), ends[1]])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(multiples))):
            for index in range(layers + 1):
                block = [ResBlock(width + skips.pop(), emb, multiples[level] * base, scale_shift)]
                width = multiples[level] * base
                if factor in attention:
                    block.append(attend(width, level, crossing[level]))
                if level and index == layers:
                    block.append(ResBlock(width, emb, width, scale_shift, "up") if updown else Upsample(width))
                    factor //= 2
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, channels[1], 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        half = self.base // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)[None]
        emb = self.time_embed(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))
        if label is not None:
            emb = emb + self.label_emb(label)

        def run(block: nn.Module, h: Tensor) -> Tensor:
            for layer in block.children():
                match layer:
                    case ResBlock():
                        h = layer(h, emb)
                    case SpatialTransformer():
                        h = layer(h, context)
                    case _:
                        h = layer(h)
            return h

        skips, h = [], x
        for block in self.input_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        out: Tensor = self.out(h)
        return out
