"""The structure of the UNet, for both of the classes that diffusers has for it.

Their files look alike, but `attention_head_dim` is the *number* of heads in one and the *width* of a head in the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self, TypeVar

from models.config.fields import (
    MOST_LAYERS,
    UnsupportedStructure,
    check_choices,
    check_groups,
    check_sizes,
    known_fields,
    sides,
    strings,
)

T = TypeVar("T", int, bool)
Off = dict[str, tuple[Any, ...]]

SIZES: Final = 6
"""Height and width of the original picture, top and left of the crop, height and width of the result (Podell et al.
2023, section 2.2)."""


class _Family(NamedTuple):
    """One of diffusers' classes: `foreign` are the fields that only the other one has, `absent` what it takes for a
    field that its file leaves out (where that is not our default), `off` options with the values that do nothing."""

    down_blocks: tuple[str, ...]
    up_blocks: tuple[str, ...]
    foreign: tuple[str, ...]
    absent: Mapping[str, Any]
    off: Off


_OFF: Final[Off] = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "dropout": (0, 0.0),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1, 1.0),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
}

_TEXT_OFF: Final[Off] = {
    **_OFF,
    "addition_embed_type_num_heads": (64, None),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
}

_TEXT: Final = _Family(
    ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    ("UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    foreign=("downsample_type", "upsample_type", "attn_norm_num_groups", "add_attention"),
    absent={},
    off=_TEXT_OFF,
)
_PLAIN: Final = _Family(
    ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    foreign=(
        *("cross_attention_dim", "transformer_layers_per_block", "use_linear_projection"),
        *("only_cross_attention", "upcast_attention"),
        *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    ),
    absent={
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    },
    off={**_OFF, "mid_block_type": ("UNetMidBlock2D",), "cross_attention_dim": (None,)},
)
_FAMILIES: Final = {"UNet2DConditionModel": _TEXT, "UNet2DModel": _PLAIN}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The UNet of LDM (Rombach et al. 2022, section 3.3).

    With a `cross_attention_dim`, the width of the context's tokens, it is diffusers' `UNet2DConditionModel`, whose
    `attention_head_dim` is the number of heads. With None nothing attends to a context; it is a `UNet2DModel`, whose
    `attention_head_dim` is the width of a head, None for a single one. Either is one number or one per level, finest
    first; diffusers itself takes one width only.
    """

    sample_size: int | tuple[int, ...] = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    num_class_embeds: int | None = None
    resnet_time_scale_shift: str = "default"
    # With text alone.
    cross_attention_dim: int | None = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    only_cross_attention: bool | tuple[bool, ...] = False
    upcast_attention: bool = False
    # SDXL's: a pooled text and the sinusoids of six sizes, of this width each; the width of them all.
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    # Without text alone. The types count for levels with attention; others name theirs in their block's.
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attn_norm_num_groups: int | None = None
    add_attention: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, "in_channels", "out_channels", "norm_num_groups")
        check_sizes(self, "layers_per_block", most=MOST_LAYERS)
        if not all(1 <= depth <= MOST_LAYERS for depth in self.depths):
            raise ValueError(f"transformer_layers_per_block of {self.depths}: expected 1 or more, to {MOST_LAYERS}")
        for name in ("cross_attention_dim", "num_class_embeds", "attn_norm_num_groups"):
            if getattr(self, name) is not None:
                check_sizes(self, name)
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps}: expected more than 0")
        sides(self.sample_size)
        check_choices(self, resnet_time_scale_shift=("default", "scale_shift"))
        check_choices(self, downsample_type=("conv", "resnet"), upsample_type=("conv", "resnet"))
        check_choices(self, addition_embed_type=(None, "text_time"))
        self._check_addition()
        self._check_family()
        self._check_levels()
        self._check_widths()

    def _check_family(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in self._family.foreign or field.name == "cross_attention_dim":
                continue
            if getattr(self, field.name) != field.default:
                raise UnsupportedStructure(
                    f"UNetConfig: {field.name}={getattr(self, field.name)!r} means nothing to a {self._class_name}; "
                    f"expected {field.default!r}"
                )

    def _check_addition(self) -> None:
        names = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        if self.addition_embed_type is not None:
            check_sizes(self, *names)
            if self.pooled_width < 1:
                raise ValueError(f"{names[1]}={getattr(self, names[1])}: expected more than {SIZES} times {names[0]}")
        elif any(getattr(self, name) is not None for name in names):
            raise UnsupportedStructure(f"{names[0]} or {names[1]} without addition_embed_type: expected None")

    def _check_levels(self) -> None:
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                f"block_out_channels has {levels} levels; down_block_types and up_block_types must have as many, "
                f"not {len(self.down_block_types)} and {len(self.up_block_types)}"
            )
        family = self._family
        unknown = [t for t in self.down_block_types if t not in family.down_blocks]
        unknown += [t for t in self.up_block_types if t not in family.up_blocks]
        if unknown:
            expected = family.down_blocks + family.up_blocks
            raise UnsupportedStructure(f"{self._class_name} blocks {unknown} are not supported; expected {expected}")
        for name in ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries; expected one, or one per level ({levels})")

    def _check_widths(self) -> None:
        check_groups(self.block_out_channels, self.norm_num_groups)
        if self.attn_norm_num_groups is not None:
            check_groups(self.block_out_channels[-1:], self.attn_norm_num_groups, "attn_norm_num_groups")
        if self.attention_head_dim is None and self.cross_attention_dim is not None:
            raise UnsupportedStructure("attention_head_dim=None: expected a number of heads")
        what = "heads of width" if self.cross_attention_dim is None else "a number of attention heads of"
        numbers = self._per_level(1 if self.attention_head_dim is None else self.attention_head_dim)
        middle = len(numbers) - 1
        for level, (channels, number) in enumerate(zip(self.block_out_channels, numbers, strict=True)):
            blocks = (self.down_block_types[level], self.up_block_types[middle - level])
            attends = level == middle or any("Attn" in block for block in blocks)
            if number < 1 or (attends and channels % number):
                raise ValueError(f"{channels} channels cannot be split into {what} {number}")

    @property
    def _class_name(self) -> str:
        return "UNet2DModel" if self.cross_attention_dim is None else "UNet2DConditionModel"

    @property
    def _family(self) -> _Family:
        return _FAMILIES[self._class_name]

    def _per_level(self, value: T | tuple[T, ...]) -> tuple[T, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads, one entry per level."""
        if self.attention_head_dim is None:
            return self._per_level(1)
        numbers = self._per_level(self.attention_head_dim)
        if self.cross_attention_dim is not None:
            return numbers
        return tuple(channels // width for channels, width in zip(self.block_out_channels, numbers, strict=True))

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks one after another, one entry per level."""
        return self._per_level(self.transformer_layers_per_block)

    @property
    def only_cross(self) -> tuple[bool, ...]:
        """Whether what else is self-attention attends to the context too, one entry per level."""
        return self._per_level(self.only_cross_attention)

    @property
    def middle_norm_groups(self) -> int | None:
        """Groups of the norm before the middle attention of a `UNet2DModel`; None, as diffusers has it: no norm."""
        if self.attn_norm_num_groups is None and self.resnet_time_scale_shift == "scale_shift":
            return None
        return self.attn_norm_num_groups or self.norm_num_groups

    @property
    def context_width(self) -> int:
        """Width of the context's tokens; 0 where nothing attends to one."""
        return self.cross_attention_dim or 0

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text that is embedded beside the timestep; 0 where none is."""
        return (self.projection_class_embeddings_input_dim or 0) - SIZES * (self.addition_time_embed_dim or 0)

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the latents in training."""
        return sides(self.sample_size)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises UnsupportedStructure for what these modules do not implement."""
        name = str(data.get("_class_name", "UNet2DConditionModel"))
        if name not in _FAMILIES:
            raise UnsupportedStructure(f"a UNet of class {name!r} is not supported; expected {' or '.join(_FAMILIES)}")
        family = _FAMILIES[name]
        neutral = {field.name: (field.default,) for field in dataclasses.fields(cls) if field.name in family.foreign}
        off = {**neutral, **family.off, "num_attention_heads": (None, data.get("attention_head_dim", 8))}
        values = known_fields(cls, {**family.absent, **_present(data)}, off, without=family.foreign)
        if family is _PLAIN:
            values["cross_attention_dim"] = None
        elif values.get("cross_attention_dim", 0) is None:
            raise UnsupportedStructure(f"a {name} with cross_attention_dim=None; expected the width of its context")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        own = {key: value for key, value in dataclasses.asdict(self).items() if key not in self._family.foreign}
        return {"_class_name": self._class_name, **own}


def _present(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` less what says nothing, with blocks by their present names."""
    data = {**data}
    for name in ("sample_size", "upcast_attention"):
        if name in data and data[name] is None:
            del data[name]
    data.pop("num_train_timesteps", None)  # the size of a learned time embedding, which none of these has
    for name in ("down_block_types", "up_block_types"):
        if name in data:
            data[name] = [block.removeprefix("UNetRes") for block in strings(data, name)]
    return data
