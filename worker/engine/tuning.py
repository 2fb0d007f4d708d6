"""A loaded model in its fast form for inference: same interface, same weights, same pictures within rounding.

The original stays as it is; what the two share is shared.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import (
    AttendFn,
    Attention,
    KeyValue,
    PixelAttention,
    SpatialTransformer,
    attend_with,
    fused_attention,
    plain_attention,
)
from models.autoencoder import Codebook
from models.latent_diffusion import LatentDiffusion
from models.layers import ResnetBlock, expand_rows, timestep_embedding
from models.unet import UNet
from worker.engine.tuned_blocks import TunedPixelAttention, TunedResnetBlock, TunedTextAttention, TunedTransformer
from worker.engine.tuned_layers import (
    PackedConv,
    PackedLinear,
    Site,
    TunedConv,
    TunedGroupNorm,
    TunedLinear,
    can_pack,
    even_silu_,
    pack_at_next_call,
)

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ATTENTION: dict[str, AttendFn] = {"fused": fused_attention, "plain": plain_attention}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """`dtype` of weights and activations; latents, guidance and sampler stay in fp32. `packed`: oneDNN's own order of
    weights. `attention`: the fused kernel, or two matrix products and a softmax."""

    dtype: Dtype = "float32"
    packed: bool = False
    attention: Literal["fused", "plain"] = "fused"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES or self.attention not in _ATTENTION:
            raise ValueError(f"{self}: expected dtype float32, bfloat16 or float16, attention fused or plain")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Raises ValueError for anything but the fields above."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"no tuning: {data}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


def default_tuning(device: torch.device, dtype: Dtype = "float32") -> Tuning:
    """Fast and safe where nothing was measured."""
    return Tuning(dtype, packed=_packs(device, dtype))


def candidates(device: torch.device, dtype: Dtype) -> list[Tuning]:
    """What is worth measuring."""
    packings = [True, False] if _packs(device, dtype) else [False]
    attentions: list[Literal["fused", "plain"]] = ["fused", "plain"] if device.type == "cpu" else ["fused"]
    return [Tuning(dtype, packed, attention) for packed, attention in itertools.product(packings, attentions)]


def _packs(device: torch.device, dtype: Dtype) -> bool:
    """Few CPUs compute in fp16; on the others the packed operators refuse it."""
    return device.type == "cpu" and dtype != "float16" and can_pack()


@torch.no_grad()
def tune(model: LatentDiffusion, tuning: Tuning, size: tuple[int, int] | None = None) -> LatentDiffusion:
    """`size`, (height, width) of latents, is the one to be fastest at; that of the training where it is not given.

    What runs once per text stays as it is. An autoencoder that may leave the range of fp16 runs in fp32 instead.
    """
    too_wide = tuning.dtype == "float16" and model.autoencoder.config.force_upcast
    autoencoder = Workshop(dataclasses.replace(tuning, dtype="float32") if too_wide else tuning).tree(model.autoencoder)
    tuned = copy.copy(model)
    tuned._modules = {**model._modules, "unet": TunedUNet(model.unet, Workshop(tuning)), "autoencoder": autoencoder}
    if tuning.packed:
        _pack(tuned, *(size or model.unet.config.size))
    return tuned


def _pack(model: LatentDiffusion, height: int, width: int) -> None:
    """For one size, at every start the same: bits of other sizes must not depend on what came before them."""
    latents = torch.zeros(1, model.autoencoder.config.latent_channels, height, width)
    pack_at_next_call(model.unet)
    config = model.unet.config
    emb = model.unet.embed_time(torch.zeros(1, dtype=torch.long))
    token = torch.zeros(1, 1, config.context_width, dtype=emb.dtype)
    x = torch.zeros(1, config.in_channels, height, width, dtype=emb.dtype)
    model.unet.denoise(x, emb, model.unet.project_context(token))
    pack_at_next_call(model.autoencoder.decoder)
    model.decoding(latents).step()


class TunedUNet(UNet):
    """Where nothing is added to it the time embedding is projected for all blocks in `embed_time`, hence once per
    timestep for good; with class labels or an addition, which come before a non-linearity, in one product per step.

    For adapters, by the names of the original modules: `step_sites` are computed at every step, `context_sites` by
    `project_context`, `time_modules` by `embed_time`.
    """

    def __init__(self, unet: UNet, workshop: Workshop) -> None:
        nn.Module.__init__(self)
        self.config = unet.config
        for name, child in workshop.tree(unet).named_children():
            self.add_module(name, child)
        self.time_embedding = unet.time_embedding
        self.add_embedding = unet.add_embedding
        if unet.class_embedding is None:
            self.class_embedding = None
        self._dtype = workshop.dtype
        added = self.class_embedding is not None or self.add_embedding is not None
        self._projections = [] if added else workshop.projections
        self._project_step = workshop.linear(*workshop.projections) if added else None
        self.step_sites: dict[str, list[Site]] = {}
        self.context_sites: dict[str, list[Site]] = {}
        self._sort(unet, workshop.sites)
        made = self.step_sites.keys() | self.context_sites.keys()
        rest = {name: one for name, one in unet.named_modules() if name not in made}
        self.time_modules = {name: one for name, one in rest.items() if isinstance(one, nn.Linear)}

    def _sort(self, unet: UNet, sites: Sequence[tuple[nn.Module, Site]]) -> None:
        names = {module: name for name, module in unet.named_modules()}
        context = {one.to_kv for one in self.modules() if isinstance(one, TunedTextAttention)}
        for module, site in sites:
            kind = self.context_sites if site.leaf in context else self.step_sites
            kind.setdefault(names[module], []).append(site)

    def embed_time(self, t: Tensor) -> Tensor:
        sinusoids = timestep_embedding(t, self.config.block_out_channels[0])
        emb: Tensor = self.time_embedding(sinusoids.to(self.time_embedding.linear_1.weight.dtype))
        if self._project_step is None:
            emb = F.silu(emb)
            emb = torch.cat([projection(emb) for projection in self._projections], dim=-1)
        return emb.to(self._dtype)

    def embed_addition(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        return super().embed_addition(pooled, sizes).to(self._dtype)

    def project_context(self, context: Tensor) -> list[KeyValue]:
        parts = (self.down_blocks, self.mid_block, self.up_blocks)
        transformers = [one for part in parts for one in part.modules() if isinstance(one, TunedTransformer)]
        return [attention.project(context) for one in transformers for attention in one.text_attentions]

    def denoise(self, x: Tensor, emb: Tensor, kv: Sequence[KeyValue]) -> Tensor:
        if self._project_step is not None:
            # A single row would take another kernel than two, with other bits.
            rows = expand_rows(emb, 2) if emb.shape[0] == 1 else emb
            emb = self._project_step(even_silu_(rows.clone()))[: emb.shape[0]]
        return super().denoise(x, expand_rows(emb, kv[0][0].shape[0]) if kv else emb, kv)

    def head(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv_out(even_silu_(self.conv_norm_out(h)))
        return out


class Workshop:
    """Makes layers by a tuning; `projections` are the time projections met so far, `sites` tell what became of the
    original modules."""

    def __init__(self, tuning: Tuning) -> None:
        self.dtype = tuning.torch_dtype
        self._attend = _ATTENTION[tuning.attention]
        self.projections: list[nn.Linear] = []
        self.sites: list[tuple[nn.Module, Site]] = []
        self._packed = tuning.packed

    def tree(self, module: nn.Module) -> nn.Module:
        """A copy in which leaves and blocks with a faster form have it."""
        match module:
            case ResnetBlock():
                return TunedResnetBlock(module, self)
            case SpatialTransformer():
                return TunedTransformer(module, self)
            case PixelAttention():
                return TunedPixelAttention(module, self)
            case Codebook():
                return module
            case nn.Conv2d():
                return self.conv(module)
            case nn.GroupNorm() | nn.LayerNorm() | nn.Embedding():
                return self.norm(module)
        tree = copy.copy(module)
        tree._modules = {name: None if one is None else self.tree(one) for name, one in module._modules.items()}
        return tree

    def attend(self, attention: Attention) -> AttendFn:
        return attend_with(self._attend, upcast=attention.upcast)

    def linear(self, *linears: nn.Linear) -> TunedLinear:
        weight = torch.cat([one.weight.detach() for one in linears])
        biases = [one.bias.detach() for one in linears if one.bias is not None]
        leaf = self._linear(weight, torch.cat(biases) if biases else None)
        before = 0
        for one in linears:
            self._note(one, leaf, (one.in_features,), slice(before, before + one.out_features))
            before += one.out_features
        return leaf

    def halves(self, linear: nn.Linear) -> tuple[TunedLinear, TunedLinear]:
        (w1, w2), (b1, b2) = linear.weight.chunk(2), linear.bias.chunk(2)
        leaves, half = (self._linear(w1, b1), self._linear(w2, b2)), w1.shape[0]
        for leaf, before in zip(leaves, (0, half), strict=True):
            self._note(linear, leaf, (linear.in_features,), slice(0, half), slice(before, before + half))
        return leaves

    def pointwise(self, module: nn.Module) -> TunedLinear:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        weight = module.weight.flatten(1)
        leaf = self._linear(weight, module.bias)
        self._note(module, leaf, (weight.shape[1],), slice(0, weight.shape[0]))
        return leaf

    def conv(self, conv: nn.Conv2d) -> TunedConv:
        leaf = (PackedConv if self._packed else TunedConv)(conv, self.dtype)
        self._note(conv, leaf, tuple(conv.weight.shape[1:]), slice(0, conv.out_channels))
        return leaf

    def _note(
        self,
        module: nn.Module,
        leaf: TunedLinear | TunedConv,
        inputs: tuple[int, ...],
        outputs: slice,
        part: slice | None = None,
    ) -> None:
        self.sites.append((module, Site(leaf, inputs, outputs, part or slice(0, outputs.stop - outputs.start))))

    def norm(self, module: nn.Module) -> nn.Module:
        tuned = copy.deepcopy(module).to(self.dtype)
        if isinstance(tuned, nn.GroupNorm):
            tuned.__class__ = TunedGroupNorm  # the same in all but its `forward`
        return tuned

    def shift(self, projection: nn.Linear) -> slice:
        before = sum(one.out_features for one in self.projections)
        self.projections.append(projection)
        return slice(before, before + projection.out_features)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> TunedLinear:
        kind = PackedLinear if self._packed else TunedLinear
        return kind(weight.detach().to(self.dtype), None if bias is None else bias.detach().to(self.dtype))
