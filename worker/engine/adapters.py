"""Different low-rank adapters for different rows of one batch.

Every row adds its own term to what the leaves of the tuned UNet compute: out += (x A) B, A [in, R] and B [R, out], with
weight and alpha / rank in B. A picture's adapters lie side by side along R, which is padded with zeros, so that rows of
whatever adapters share a lane. A row's term is computed from this row alone, and a row without an adapter for some
module adds an exact zero there: neighbours change nothing.

Three kinds of modules never cost anything per step: those of the text encoder, the keys and values of text attentions
(both made at admission) and those of the time embedding (a row has a table of its own instead).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import expand_rows
from models.lora import Uses, attached
from worker.engine.tuned_layers import Site, TunedConv, TunedLinear, to_map, to_tokens
from worker.engine.tuning import TunedUNet

_SMALLEST_RANK = 8

Sites = Mapping[str, Sequence[Site]]
"""By the name of the original module."""


class Factors(NamedTuple):
    """Of one module, for P rows: a [P, in, R], or [P, R, in, kh, kw] of a convolution; b [P, R, out]."""

    a: Tensor
    b: Tensor


class AdapterBank:
    """The factors of P slots. Those of a module are made when a row first needs them, zeros for the other slots; they
    keep their addresses until a row that does not need them comes alone."""

    def __init__(self, unet: nn.Module, slots: int, rank: int, like: Tensor) -> None:
        """`like` has the UNet's dtype and device."""
        self._sites = _tuned(unet).step_sites
        self._slots = slots
        self._rank = rank
        self._like = like
        self.factors: dict[str, Factors] = {}
        self._rows: set[int] = set()

    def write(self, slot: int, uses: Uses) -> bool:
        """A row moves in; tells whether a step has other terms now than before."""
        names, before = _touched(uses, self._sites), set(self.factors)
        if not self._rows:
            self.factors = {name: own for name, own in self.factors.items() if name in names}
        self._rows.add(slot)
        for name in names:
            self._cover(name)
            own = _compose(uses, name, self._sites[name], self._rank)
            for bank, row in zip(self.factors[name], own, strict=True):
                bank[slot] = row
        return self.factors.keys() != before

    def clear(self, slot: int) -> None:
        self._rows.discard(slot)
        for a, b in self.factors.values():
            a[slot] = 0
            b[slot] = 0

    def cover_all(self) -> None:
        """Every module that an adapter can change gets its factors."""
        for name in self._sites:
            self._cover(name)

    def _cover(self, name: str) -> None:
        if name in self.factors:
            return
        sites = self._sites[name]
        inputs = sites[0].inputs
        shape = (self._rank, *inputs) if isinstance(sites[0].leaf, TunedConv) else (*inputs, self._rank)
        a = self._like.new_zeros(self._slots, *shape)
        b = self._like.new_zeros(self._slots, self._rank, max(site.part.stop for site in sites))
        self.factors[name] = Factors(a, b)

    @contextmanager
    def attached(self, rows: slice) -> Iterator[None]:
        """Within it, the UNet computes for the slots `rows`, once or [unconditional | conditional]."""
        with _attached(self._sites, {name: Factors(a[rows], b[rows]) for name, (a, b) in self.factors.items()}):
            yield


def padded_rank(unet: nn.Module, uses: Uses) -> int:
    """R of the lane for a picture with these adapters; 0 where none of them changes what a step computes."""
    if not uses:
        return 0
    sites = _tuned(unet).step_sites
    most = max((_rank(uses, name) for name in _touched(uses, sites)), default=0)
    return max(_SMALLEST_RANK, 1 << (most - 1).bit_length()) if most else 0


@contextmanager
def adapted_context(unet: nn.Module, uses: Uses, like: Tensor) -> Iterator[None]:
    """Within it, `project_context` makes the keys and values of one picture with these adapters."""
    if not uses:
        yield
        return
    sites = _tuned(unet).context_sites
    factors = {}
    for name in _touched(uses, sites):
        a, b = _compose(uses, name, sites[name], _rank(uses, name))
        factors[name] = Factors(a[None].to(like), b[None].to(like))
    with _attached(sites, factors):
        yield


def changes_time(unet: nn.Module, uses: Uses) -> bool:
    """Whether a row with these adapters has time embeddings of its own."""
    return bool(uses) and any(name in _tuned(unet).time_modules for adapter, _ in uses for name in adapter.unet)


@contextmanager
def adapted_time(unet: nn.Module, uses: Uses) -> Iterator[None]:
    """Within it, `embed_time` computes with these adapters."""
    with ExitStack() as stack:
        for adapter, weight in uses:
            modules = _tuned(unet).time_modules
            own = {name: low_rank for name, low_rank in adapter.unet.items() if name in modules}
            stack.enter_context(attached(modules, own, weight))
        yield


def _tuned(unet: nn.Module) -> TunedUNet:
    if not isinstance(unet, TunedUNet):
        raise ValueError("adapters need a model in its tuned form (worker.engine.tuning.tune)")
    return unet


def _touched(uses: Uses, sites: Sites) -> list[str]:
    return list(dict.fromkeys(name for adapter, _ in uses for name in adapter.unet if name in sites))


def _rank(uses: Uses, name: str) -> int:
    return sum(adapter.unet[name].rank for adapter, _ in uses if name in adapter.unet)


def _compose(uses: Uses, name: str, sites: Sequence[Site], rank: int) -> Factors:
    """One row's factors without the dimension of the slots, fp32; zeros up to `rank`."""
    low_ranks = [(adapter.unet[name], weight) for adapter, weight in uses if name in adapter.unet]
    down = torch.cat([low_rank.down.float() for low_rank, _ in low_ranks])
    b = torch.cat([weight * low_rank.scale * low_rank.up.float().t() for low_rank, weight in low_ranks])
    missing = rank - down.shape[0]
    down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
    a = down if isinstance(sites[0].leaf, TunedConv) else down.flatten(1).t()
    return Factors(a, torch.cat([b, b.new_zeros(missing, b.shape[1])]))


@contextmanager
def _attached(sites: Sites, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Leaves without factors get a term too, of nothing: with or without, they call the same kernels."""
    parts: dict[TunedLinear | TunedConv, list[_Part]] = {site.leaf: [] for each in sites.values() for site in each}
    for name, (a, b) in factors.items():
        for site in sites[name]:
            parts[site.leaf].append((a, b[..., site.part], site.outputs))
    for leaf, own in parts.items():
        leaf.term = partial(_add_to_map, leaf, own) if isinstance(leaf, TunedConv) else partial(_add_to_tokens, own)
    try:
        yield
    finally:
        for leaf in parts:
            leaf.term = None


_Part = tuple[Tensor, Tensor, slice]
"""a, b, and the channels of the leaf's output to which they add."""


def _add_to_tokens(parts: Sequence[_Part], x: Tensor, out: Tensor) -> Tensor:
    """x [kP, L, in] or [kP, in]."""
    tokens, sums = (x, out) if x.dim() == 3 else (x[:, None], out[:, None])
    for a, b, outputs in parts:
        small = torch.bmm(tokens, expand_rows(a, x.shape[0]))
        sums[..., outputs].baddbmm_(small, expand_rows(b, x.shape[0]))
    return out


def _add_to_map(conv: TunedConv, parts: Sequence[_Part], x: Tensor, out: Tensor) -> Tensor:
    """x [kP, in, H, W]. Slot by slot, which on large maps is also faster than one grouped convolution."""
    for a, b, _ in parts:
        slots = [F.conv2d(x[slot :: len(a)], own, None, conv.stride, conv.padding) for slot, own in enumerate(a)]
        small = torch.stack(slots, dim=1).flatten(0, 1)  # P of [k, R, H', W'] -> [kP, R, H', W']
        out += to_map(torch.bmm(to_tokens(small), expand_rows(b, x.shape[0])), out.shape[-2:])
    return out
