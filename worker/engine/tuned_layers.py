"""Layers as inference wants them: weights packed once for oneDNN where that is faster, residuals added by the kernel.

Feature maps lie channels-last in memory, so that [N, C, H, W] and tokens [N, HW, C] are views of one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Term = Callable[[Tensor, Tensor], Tensor]
"""(input, output) of a leaf -> the output, changed in place by what adapters add to it."""

_PACKING = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight", "_reorder_convolution_weight")


def can_pack() -> bool:
    """Whether this build of torch has the oneDNN operators that `torch.compile` uses on CPUs."""
    return torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.mkldnn, name) for name in _PACKING
    )


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, H, W] itself, if its memory is in that order."""
    return x.contiguous(memory_format=torch.channels_last)


def to_tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, HW, C]; a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, size: torch.Size) -> Tensor:
    """[N, HW, C] -> [N, C, *size], a view, channels-last."""
    return tokens.view(tokens.shape[0], *size, -1).permute(0, 3, 1, 2)


_GRAIN = 32768  # elements per thread below which torch takes fewer threads (at::internal::GRAIN_SIZE)
_STRIDE = 64  # elements that its vectorised loops do at a time, at most


def even_silu_(x: Tensor) -> Tensor:
    """SiLU in place on dense memory, rows first; equal rows get equal bits.

    On CPUs, elements that do not fill a vector at the end of a thread's share take another exponential, which may
    round differently: shares must not end within a row, unless they do so in every row.
    """
    if x.is_cuda:
        return F.silu(x, inplace=True)
    flat = (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).view(-1)
    shares = min(torch.get_num_threads(), -(-flat.numel() // _GRAIN))
    if flat.numel() % (shares * _STRIDE) == 0 and flat.numel() // x.shape[0] % _STRIDE == 0:
        F.silu(flat, inplace=True)
        return x
    whole = flat.numel() // x.shape[0] % _STRIDE == 0
    for part in torch.split(flat, _GRAIN if whole else flat.numel() // x.shape[0]):
        F.silu(part, inplace=True)
    return x


class TunedGroupNorm(nn.GroupNorm):
    """Gives a row the same bits in every batch. On CPUs, torch splits the sums over a large channels-last map among
    its threads unless there are whole rows for each of them: where there are not, some are repeated."""

    SPLIT = 1024  # pixels from which on it does (`feature_map_threshold` in torch's group_norm_kernel.cpp)

    def forward(self, x: Tensor) -> Tensor:
        rows, missing = x.shape[0], -x.shape[0] % torch.get_num_threads()
        if not missing or x.is_cuda or x.shape[-2] * x.shape[-1] < self.SPLIT:
            return super().forward(x)
        return super().forward(torch.cat([x, *[x[:1]] * missing]))[:rows]


class TunedLinear(nn.Module):
    """`forward` as nn.Linear's; `add` and `times` put a residual or a factor of the output's shape on top.

    `term` is set while a batch with adapters is computed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.term: Term | None = None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.linear(x, self.weight, self.bias)
        return out if self.term is None else self.term(x, out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self(x)
        return out.add_(residual)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return factor.mul_(self(x))


class PackedLinear(TunedLinear):
    """oneDNN keeps the weights in its own order; x is made contiguous by the operator."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return out if self.term is None else self.term(x, out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return out if self.term is None else self.term(x, out)

    def gelu(self, x: Tensor) -> Tensor:
        if self.term is not None:
            return super().gelu(x)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "gelu", [], "none")
        return out

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        if self.term is not None:
            return super().times(x, factor)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")
        return out


class TunedConv(nn.Module):
    """`forward` as nn.Conv2d's; `add` puts a residual of the output's shape on top. `term` as `TunedLinear`'s."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, layout: torch.memory_format = torch.channels_last) -> None:
        super().__init__()
        self.term: Term | None = None
        self.stride = list(conv.stride)
        self.padding = [int(side) for side in conv.padding]
        self.register_buffer("weight", conv.weight.detach().to(dtype, memory_format=layout))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().to(dtype))
        self.weight: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.conv2d(channels_last(x), self.weight, self.bias, self.stride, self.padding)
        return out if self.term is None else self.term(x, out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self(x)
        return out.add_(residual)


class PackedConv(TunedConv):
    """oneDNN's best order of the weights depends on the size of the feature map, not on the batch: `pack_next` keeps
    one for the size of the next call. Other sizes take the weights as they are, somewhat slower."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        # As they came, hence shared with the model that was loaded: the packed ones are the copy that is computed with.
        super().__init__(conv, dtype, torch.preserve_format)
        self.pack_next = False
        self._size: torch.Size | None = None
        self._packed = self.weight

    def _weight(self, x: Tensor) -> Tensor:
        if self.pack_next:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self._packed = pack(self.weight, self.padding, self.stride, [1, 1], 1, list(x.shape))
            self._size, self.pack_next = x.shape[2:], False
        return self._packed if x.shape[2:] == self._size else self.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            channels_last(x), self._weight(x), self.bias, self.padding, self.stride, [1, 1], 1, "none", [], ""
        )
        out = channels_last(out)  # a single row in an order that fits two does not tell the operator which it is
        return out if self.term is None else self.term(x, out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
            channels_last(x), residual, self._weight(x), self.bias, self.padding, self.stride, [1, 1], 1, "add", 1.0,
            None, [], None
        )  # fmt: skip
        return out if self.term is None else self.term(x, out)


class Site(NamedTuple):
    """Where (some of) the outputs of an original module are computed: the channels `part` of them are the channels
    `outputs` of `leaf`, from inputs [in], or [in, kh, kw] of a convolution."""

    leaf: TunedLinear | TunedConv
    inputs: tuple[int, ...]
    outputs: slice
    part: slice


def pack_at_next_call(module: nn.Module) -> None:
    """Every `PackedConv` below packs its weights for what it is called with next."""
    for one in module.modules():
        if isinstance(one, PackedConv):
            one.pack_next = True
