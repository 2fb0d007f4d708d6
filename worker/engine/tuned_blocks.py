"""The blocks of UNet and autoencoder for inference: the same functions of the same weights in fewer, faster calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from models.attention import (
    GEGLU,
    AttendFn,
    Attention,
    FeedForward,
    KeyValue,
    PixelAttention,
    SpatialTransformer,
    TransformerBlock,
)
from models.layers import ResnetBlock, expand_rows, resample
from worker.engine.tuned_layers import TunedConv, TunedLinear, even_silu_, to_map, to_tokens


class LayerMaker(Protocol):
    """Makes the leaves, from the original's weights."""

    def attend(self, attention: Attention) -> AttendFn: ...

    def linear(self, *linears: nn.Linear) -> TunedLinear:
        """Several linears of the same input become one, outputs side by side."""

    def halves(self, linear: nn.Linear) -> tuple[TunedLinear, TunedLinear]:
        """First and second half of the outputs."""

    def pointwise(self, module: nn.Module) -> TunedLinear:
        """A linear, or a 1x1 convolution as one over tokens."""

    def conv(self, conv: nn.Conv2d) -> TunedConv: ...

    def norm(self, module: nn.Module) -> nn.Module: ...

    def shift(self, projection: nn.Linear) -> slice:
        """Where the outputs of this time projection lie among those of all."""


class TunedResnetBlock(nn.Module):
    """The time embedding comes projected for all blocks at once; `shift` is this one's part of it."""

    def __init__(self, block: ResnetBlock, make: LayerMaker) -> None:
        super().__init__()
        self.norm1, self.norm2 = make.norm(block.norm1), make.norm(block.norm2)
        self.conv1, self.conv2 = make.conv(block.conv1), make.conv(block.conv2)
        self.shortcut = None if block.conv_shortcut is None else make.conv(block.conv_shortcut)
        self.shift = None if block.time_emb_proj is None else make.shift(block.time_emb_proj)
        self.scale_shift = block.scale_shift
        self.resample = block.resample

    def forward(self, x: Tensor, shifts: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """x [N, Cin, H, W], shifts [N or more, all channels] -> [N, Cout, H', W']."""
        h = even_silu_(self.norm1(x))
        if self.resample is not None:
            h, x = resample(h, self.resample, size), resample(x, self.resample, size)
        h = self.conv1(h)
        if self.shift is None or shifts is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = shifts[: h.shape[0], self.shift, None, None].chunk(2, dim=1)
            h = self.norm2(h).mul_(1 + scale).add_(shift)
        else:
            h = self.norm2(h.add_(shifts[: h.shape[0], self.shift, None, None]))
        return self.conv2.add(even_silu_(h), x if self.shortcut is None else self.shortcut(x))


class TunedSelfAttention(nn.Module):
    """Queries, keys and values from one matrix product."""

    def __init__(self, attention: Attention, make: LayerMaker) -> None:
        super().__init__()
        self.heads = attention.heads
        self.attend = make.attend(attention)
        self.to_qkv = make.linear(attention.to_q, attention.to_k, attention.to_v)
        self.to_out = make.pointwise(attention.to_out[0])

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [N, L, C] -> [N, L, C]."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, L, d]
        return self.to_out.add(_merge_heads(self.attend(q, k, v)), residual)


class TunedTextAttention(nn.Module):
    def __init__(self, attention: Attention, make: LayerMaker) -> None:
        super().__init__()
        self.heads = attention.heads
        self.attend = make.attend(attention)
        self.to_q = make.linear(attention.to_q)
        self.to_kv = make.linear(attention.to_k, attention.to_v)
        self.to_out = make.pointwise(attention.to_out[0])

    def project(self, context: Tensor) -> KeyValue:
        """context [N, L, D]."""
        k, v = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def forward(self, x: Tensor, kv: KeyValue, residual: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.to_out.add(_merge_heads(self.attend(q, *kv)), residual)


class TunedFeedForward(nn.Module):
    """GEGLU with its GELU and its product done by the matrix products."""

    def __init__(self, ff: FeedForward, make: LayerMaker) -> None:
        super().__init__()
        geglu = ff.net[0]
        assert isinstance(geglu, GEGLU)
        self.value, self.gate = make.halves(geglu.proj)
        self.out = make.pointwise(ff.net[2])

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.out.add(self.value.times(x, self.gate.gelu(x)), residual)


class TunedTransformerBlock(nn.Module):
    def __init__(self, block: TransformerBlock, make: LayerMaker) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (make.norm(one) for one in (block.norm1, block.norm2, block.norm3))
        self.attn1 = (TunedTextAttention if block.only_cross else TunedSelfAttention)(block.attn1, make)
        self.attn2 = TunedTextAttention(block.attn2, make)
        self.ff = TunedFeedForward(block.ff, make)

    @property
    def text_attentions(self) -> Iterator[TunedTextAttention]:
        for one in (self.attn1, self.attn2):
            if isinstance(one, TunedTextAttention):
                yield one

    def forward(self, x: Tensor, kvs: Iterator[KeyValue]) -> Tensor:
        """x [P or kP, L, C] -> [kP, L, C]."""
        if isinstance(self.attn1, TunedTextAttention):
            kv = next(kvs)
            x = expand_rows(x, kv[0].shape[0])
            x = self.attn1(self.norm1(x), kv, x)
        else:
            x = self.attn1(self.norm1(x), x)
        kv = next(kvs)
        x = expand_rows(x, kv[0].shape[0])
        x = self.attn2(self.norm2(x), kv, x)
        out: Tensor = self.ff(self.norm3(x), x)
        return out


class TunedTransformer(nn.Module):
    def __init__(self, transformer: SpatialTransformer, make: LayerMaker) -> None:
        super().__init__()
        self.norm = make.norm(transformer.norm)
        self.proj_in, self.proj_out = make.pointwise(transformer.proj_in), make.pointwise(transformer.proj_out)
        blocks = [TunedTransformerBlock(one, make) for one in transformer.transformer_blocks]  # type: ignore[arg-type]
        self.transformer_blocks = nn.ModuleList(blocks)

    @property
    def text_attentions(self) -> Iterator[TunedTextAttention]:
        for block in self.transformer_blocks:
            assert isinstance(block, TunedTransformerBlock)
            yield from block.text_attentions

    def forward(self, x: Tensor, kvs: Iterator[KeyValue]) -> Tensor:
        """x [P or kP, C, H, W] -> [kP, C, H, W]."""
        h = self.proj_in(to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, kvs)
        return to_map(self.proj_out.add(h, expand_rows(to_tokens(x), h.shape[0])), x.shape[-2:])


class TunedPixelAttention(nn.Module):
    """Self-attention without text, [N, C, H, W]."""

    def __init__(self, attention: PixelAttention, make: LayerMaker) -> None:
        super().__init__()
        self.norm = make.norm(attention.group_norm)
        self.attention = TunedSelfAttention(attention, make)

    def forward(self, x: Tensor, kvs: object = None) -> Tensor:
        return to_map(self.attention(to_tokens(self.norm(x)), to_tokens(x)), x.shape[-2:])


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [N, heads, L, d] -> [N, L, C]
