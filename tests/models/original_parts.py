"""The autoencoders and text transformers of the published files, with their authors' names, as `original_unet` has the
UNet."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, source: int, width: int) -> None:
        super().__init__()
        self.norm1 = norm(source)
        self.conv1 = nn.Conv2d(source, width, 3, padding=1)
        self.norm2 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if source != width:
            self.nin_shortcut = nn.Conv2d(source, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        out: Tensor = (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h
        return out


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))  # [N, C, L]
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)
        out: Tensor = x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))
        return out


class Middle(nn.Module):
    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width)
        self.attn_1 = AttnBlock(width) if attention else nn.Identity()
        self.block_2 = ResnetBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Resampling(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=2 - stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.stride == 2 else F.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """`resample` is "downsample" or "upsample", what comes after the blocks, if anything."""

    def __init__(self, source: int, width: int, blocks: int, attention: bool, resample: str) -> None:
        super().__init__()
        self.resample = resample
        if resample:
            setattr(self, resample, Resampling(width, 2 if resample == "downsample" else 1))
        self.block = nn.ModuleList(ResnetBlock(source if i == 0 else width, width) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(width) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return getattr(self, self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], z: int, layers: int, attention: tuple[bool, bool]) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        sources = (widths[0], *widths)
        self.down = nn.ModuleList(
            Level(source, width, layers, attention[0] and i == last, "downsample" if i < last else "")
            for i, (source, width) in enumerate(zip(sources, widths, strict=False))
        )
        self.mid = Middle(widths[-1], attention[1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """`up` is numbered as the encoder's `down`, and run from its end."""

    def __init__(self, widths: tuple[int, ...], z: int, layers: int, attention: tuple[bool, bool]) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention[1])
        sources = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(
            Level(source, width, layers + 1, attention[0] and i == last, "upsample" if i else "")
            for i, (source, width) in enumerate(zip(sources, widths, strict=True))
        )
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Quantizer(nn.Module):
    def __init__(self, codes: int, z: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, z)

    def forward(self, z: Tensor) -> Tensor:
        distances = torch.cdist(z.flatten(2).transpose(1, 2), self.embedding.weight[None])
        out: Tensor = self.embedding(distances.argmin(-1)).transpose(1, 2).reshape(z.shape)
        return out


class FirstStage(nn.Module):
    """With `codes` a VQModel, else an AutoencoderKL. `attention`: at the deepest level, and in the middle."""

    def __init__(
        self,
        widths: tuple[int, ...],
        z: int,
        codes: int | None = None,
        layers: int = 1,
        attention: tuple[bool, bool] = (False, True),
    ) -> None:
        super().__init__()
        moments = z if codes else 2 * z
        self.encoder = Encoder(widths, moments, layers, attention)
        self.decoder = Decoder(widths, z, layers, attention)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        if codes:
            self.quantize = Quantizer(codes, z)

    def encode(self, x: Tensor) -> Tensor:
        """Latents before quantising, or the posterior's mean."""
        moments: Tensor = self.quant_conv(self.encoder(x))
        return moments if hasattr(self, "quantize") else moments.chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        z = self.quantize(z) if hasattr(self, "quantize") else z
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out


class BertAttention(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rows(x).unflatten(-1, (8, -1)).transpose(1, 2) for rows in (self.to_q, self.to_k, self.to_v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        out: Tensor = self.to_out((weights @ v).transpose(1, 2).flatten(2))
        return out


class BertFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Layers(nn.Module):
    def __init__(self, width: int, inner: int, depth: int) -> None:
        super().__init__()
        pairs = [part for _ in range(depth) for part in (BertAttention(width, inner), BertFeedForward(width))]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(width), part]) for part in pairs)


class Bert(nn.Module):
    """LDM's transformer, one of x-transformers'."""

    def __init__(self, vocabulary: int, width: int, inner: int, depth: int, length: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(length, width)})
        self.attn_layers = Layers(width, inner, depth)
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_emb(ids) + self.pos_emb["emb"](torch.arange(ids.shape[1]))
        for layer in self.attn_layers.layers:
            before, part = layer.children()
            x = x + part(before(x))
        out: Tensor = self.norm(x)
        return out


class OpenClipBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        inner = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(inner))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class OpenClip(nn.Module):
    """Its text half; Stable Diffusion 2 reads what the last block but one gives, after the final norm, SDXL before it,
    and the projection of the text's end, whose token has the largest id."""

    def __init__(self, vocabulary: int, width: int, depth: int, length: int, projection: int | None = None) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(length, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(OpenClipBlock(width) for _ in range(depth))})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, projection or width))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def penultimate(self, ids: Tensor) -> Tensor:
        x: Tensor = self.token_embedding(ids) + self.positional_embedding
        for block in list(self.transformer["resblocks"].children())[:-1]:
            x = block(x)
        return x

    def pooled(self, ids: Tensor) -> Tensor:
        *_, last = self.transformer["resblocks"].children()
        ends: Tensor = self.ln_final(last(self.penultimate(ids)))[torch.arange(len(ids)), ids.argmax(-1)]
        return ends @ self.text_projection

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.ln_final(self.penultimate(ids))
        return out
