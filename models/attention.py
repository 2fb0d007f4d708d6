"""Attention over flattened feature maps: softmax(Q K^T / sqrt(d)) V (Rombach et al. 2022, equation after (2))."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import expand_rows

AttendFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [N, heads, Lq, d], k and v [N, heads, Lk, d] -> [N, heads, Lq, d]."""

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one text attention, each [N, heads, L, d]."""


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products and a softmax: on CPUs its backward is far faster than that of the fused kernel."""
    weights: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return weights.softmax(dim=-1) @ v


def upcast_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`plain_attention` with scores in fp32 whatever the inputs are."""
    weights: Tensor = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    return weights.softmax(dim=-1).to(v.dtype) @ v


def attend_with(attend: AttendFn, *, upcast: bool) -> AttendFn:
    """`attend` in the form that keeps scores in fp32, if `upcast`: the fused kernels have them so anyway."""
    return upcast_attention if upcast and attend is plain_attention else attend


class Attention(nn.Module):
    """Multi-head attention whose keys and values come from `context_dim` wide tokens (or from x itself).

    `upcast`: scores may leave the range or the precision of half floats.
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int | None = None, *, bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.attend: AttendFn = fused_attention
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        # A list, as in the published weights, whose second entry was a dropout.
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)  # [N, L, C] -> [N, heads, L, d]

    def project(self, context: Tensor) -> KeyValue:
        """Keys and values of context [N, L, D]."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, kv: KeyValue | None = None) -> Tensor:
        """x [N, L, C] attends to `kv`, or to itself."""
        k, v = self.project(x) if kv is None else kv
        h = self.attend(self._split(self.to_q(x)), k, v)
        out: Tensor = self.to_out[0](h.transpose(1, 2).flatten(2))
        return out


class PixelAttention(Attention):
    """Self-attention over the pixels of a map, with its own norm (None: without) and residual, [N, C, H, W]."""

    def __init__(self, channels: int, heads: int, *, groups: int | None, eps: float) -> None:
        super().__init__(channels, heads, bias=True)
        self.group_norm = nn.Identity() if groups is None else nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, kvs: object = None) -> Tensor:
        """Called as a SpatialTransformer; takes no entry of `kvs`."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        return x + super().forward(tokens).transpose(1, 2).reshape(x.shape)


class GEGLU(nn.Module):
    """First half of the projection, gated by the exact GELU of the second (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1 was a dropout in the published modules; the keys are net.0 and net.2.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, text attention, feed-forward, each pre-normed and residual.

    With `only_cross` the first attends to the text as well.
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int, *, only_cross: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context_dim if only_cross else None, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    @property
    def text_attentions(self) -> tuple[Attention, ...]:
        """Those that take an entry of `kvs`, in that order."""
        return (self.attn1, self.attn2) if self.only_cross else (self.attn2,)

    def forward(self, x: Tensor, kvs: Iterator[KeyValue]) -> Tensor:
        """x [P or kP, L, C], kvs of kP rows -> [kP, L, C]: text attention is where rows first differ by text."""
        if self.only_cross:
            kv = next(kvs)
            x = expand_rows(x, kv[0].shape[0])
            x = x + self.attn1(self.norm1(x), kv)
        else:
            x = x + self.attn1(self.norm1(x))
        kv = next(kvs)
        x = expand_rows(x, kv[0].shape[0])
        x = x + self.attn2(self.norm2(x), kv)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with an outer residual (diffusers' `Transformer2DModel`)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int,
        *,
        depth: int,
        groups: int,
        linear: bool,
        only_cross: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, heads, context_dim, only_cross=only_cross, upcast=upcast) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)

    @property
    def text_attentions(self) -> Iterator[Attention]:
        for block in self.transformer_blocks:
            assert isinstance(block, TransformerBlock)
            yield from block.text_attentions

    def forward(self, x: Tensor, kvs: Iterator[KeyValue]) -> Tensor:
        """x [P or kP, C, H, W]; takes an entry of `kvs` per text attention -> [kP, C, H, W]."""
        size = x.shape[-2:]
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [N, HW, C]
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, kvs)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(-1, size)
        if not self.linear:
            h = self.proj_out(h)
        out: Tensor = expand_rows(x, h.shape[0]) + h
        return out


def set_attention(module: nn.Module, attend: AttendFn) -> None:
    """Use `attend` in every attention below `module`."""
    for child in module.modules():
        if isinstance(child, Attention):
            child.attend = attend_with(attend, upcast=child.upcast)
