"""Low-rank adapters (LoRA, Hu et al. 2021): h = W x + weight * (alpha / rank) * up(down(x)).

W stays as it is, also with several adapters at once; `merge` is for tools and tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """down [r, in] or [r, in, kh, kw] as the module's weight, up [out, r]; `scale` is alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """What is added to the module's weight at weight 1, fp32 [out, in(, kh, kw)]."""
        delta = self.scale * (self.up.float() @ self.down.float().flatten(1))
        return delta.reshape(-1, *self.down.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """By the names of the UNet's modules, and of the conditioner's; on the CPU, in the file's dtype."""

    unet: Mapping[str, LowRank]
    text: Mapping[str, LowRank]
    digest: str


Uses = Sequence[tuple[Adapter, float]]
"""Adapters of one picture with their weights; 1 = as trained."""


@contextmanager
def adapted(model: LatentDiffusion, uses: Uses) -> Iterator[None]:
    """Within it, `model` computes with these adapters; its weights stay as they are."""
    modules = dict(model.unet.named_modules())
    with adapted_text(model, uses), ExitStack() as stack:
        for adapter, weight in uses:
            stack.enter_context(attached(modules, adapter.unet, weight))
        yield


@contextmanager
def adapted_text(model: LatentDiffusion, uses: Uses) -> Iterator[None]:
    """Within it, texts are encoded with these adapters."""
    modules = {} if model.conditioner is None else dict(model.conditioner.named_modules())
    with ExitStack() as stack:
        for adapter, weight in uses:
            stack.enter_context(attached(modules, adapter.text, weight))
        yield


@contextmanager
def attached(modules: Mapping[str, nn.Module], low_ranks: Mapping[str, LowRank], weight: float) -> Iterator[None]:
    """Within it, these modules add their low-rank terms."""
    with ExitStack() as stack:
        for name, low_rank in low_ranks.items():
            module = modules[name]
            stack.callback(module.register_forward_hook(_term(module, low_rank, weight)).remove)
        yield


@torch.no_grad()
def merge(model: LatentDiffusion, uses: Uses) -> None:
    """Adds the adapters to the weights, for good."""
    for adapter, weight in uses:
        for root, low_ranks in ((model.unet, adapter.unet), (model.conditioner, adapter.text)):
            for name, low_rank in low_ranks.items():
                assert root is not None
                matrix = root.get_submodule(name).weight
                assert isinstance(matrix, Tensor)
                matrix += (weight * low_rank.delta()).to(matrix)


def _term(module: nn.Module, low_rank: LowRank, weight: float) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    """As a forward hook."""
    assert isinstance(module.weight, Tensor)
    down, up = low_rank.down.to(module.weight), low_rank.up.to(module.weight)
    factor = weight * low_rank.scale

    def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            small = F.conv2d(inputs[0], down, stride=module.stride, padding=module.padding)
            return out + factor * F.conv2d(small, up[:, :, None, None])
        return out + factor * F.linear(F.linear(inputs[0], down), up)

    return add
