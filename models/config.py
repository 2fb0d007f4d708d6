"""Structures as frozen dataclasses with the field names of the diffusers `config.json` files that they read and write.

A UNet or autoencoder is described by its JSON alone. A field that this code does not implement must have the value that
leaves it off, otherwise reading fails with `UnsupportedStructure`: a model is never loaded half-understood.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self


class UnsupportedStructure(ValueError):
    """A config asks for something that these modules do not implement."""


def _known_fields(cls: type[Any], data: Mapping[str, Any], off: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The dataclass fields in `data`; every other key must be private or stand in `off` with an allowed value."""
    names = {field.name for field in dataclasses.fields(cls)}
    for key, value in data.items():
        if key in names or key.startswith("_"):
            continue
        if key not in off or value not in off[key]:
            allowed = " or ".join(map(repr, off[key])) if key in off else "its absence"
            raise UnsupportedStructure(f"{cls.__name__}: {key}={value!r} is not supported; expected {allowed}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in names}


def _check_sizes(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedStructure(f"{type(config).__name__}: {name}={value!r}; expected one positive integer")


def _check_groups(widths: tuple[int, ...], groups: int) -> None:
    for channels in widths:
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be split into norm_num_groups={groups}")


DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The text-conditioned UNet of LDM (Rombach et al. 2022, section 3.3), diffusers' `UNet2DConditionModel`.

    `attention_head_dim` is the *number of heads* (one int, or one per level): diffusers' historic name for it.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    num_class_embeds: int | None = None

    _OFF: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_scale_factor": (1, 1.0),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "only_cross_attention": (False,),
        "upcast_attention": (False, None),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "dropout": (0, 0.0),
        "class_embeddings_concat": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1, 1.0),
        **dict.fromkeys(
            (
                "addition_embed_type",
                "addition_embed_type_num_heads",
                "addition_time_embed_dim",
                "class_embed_type",
                "cross_attention_norm",
                "encoder_hid_dim",
                "encoder_hid_dim_type",
                "mid_block_only_cross_attention",
                "num_attention_heads",
                "projection_class_embeddings_input_dim",
                "reverse_transformer_layers_per_block",
                "time_cond_proj_dim",
                "time_embedding_act_fn",
                "time_embedding_dim",
                "timestep_post_act",
            ),
            (None,),
        ),
        "addition_embed_type_num_heads": (64, None),
    }

    def __post_init__(self) -> None:
        _check_sizes(self, "in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups")
        _check_sizes(self, "transformer_layers_per_block")
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                f"block_out_channels has {levels} levels; down_block_types and up_block_types must have as many, "
                f"not {len(self.down_block_types)} and {len(self.up_block_types)}"
            )
        unknown = [t for t in self.down_block_types if t not in DOWN_BLOCKS]
        unknown += [t for t in self.up_block_types if t not in UP_BLOCKS]
        if unknown:
            raise UnsupportedStructure(f"UNet blocks {unknown} are not supported; expected {DOWN_BLOCKS + UP_BLOCKS}")
        if len(self.heads) != levels:
            raise ValueError(
                f"attention_head_dim has {len(self.heads)} entries; expected one, or one per level ({levels})"
            )
        _check_groups(self.block_out_channels, self.norm_num_groups)
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads:
                raise ValueError(f"{channels} channels cannot be split into {heads} attention heads")

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads, one entry per level."""
        if isinstance(self.attention_head_dim, int):
            return (self.attention_head_dim,) * len(self.block_out_channels)
        return self.attention_head_dim

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**_known_fields(cls, data, cls._OFF))

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": "UNet2DConditionModel", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """KL-regularised autoencoder of LDM (appendix G), diffusers' `AutoencoderKL`; f = 2^(levels-1)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True

    _OFF: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "force_upcast": (True, False),
        "latents_mean": (None,),
        "latents_std": (None,),
        "shift_factor": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    }

    # What diffusers takes for a field that its file leaves out, where the paper's f=8 autoencoder has more.
    _ABSENT: ClassVar[Mapping[str, Any]] = {"block_out_channels": [64], "layers_per_block": 1}

    def __post_init__(self) -> None:
        _check_sizes(self, "in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
        _check_groups(self.block_out_channels, self.norm_num_groups)

    @property
    def downsampling_factor(self) -> int:
        """f = H / h of the paper."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        data = {**cls._ABSENT, **data}
        levels = len(data["block_out_channels"])
        off = {
            **cls._OFF,
            "down_block_types": (["DownEncoderBlock2D"] * levels,),
            "up_block_types": (["UpDecoderBlock2D"] * levels,),
        }
        return cls(**_known_fields(cls, data, off))

    def to_dict(self) -> dict[str, Any]:
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **dataclasses.asdict(self),
        }


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule and DDIM settings, diffusers' `DDIMScheduler`. `steps_offset` counts for leading spacing alone."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    # diffusers' latent pipelines never clip latents, whatever the file says (its DDIMScheduler default is True).
    _OFF: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "clip_sample": (False, True),
        "clip_sample_range": (1.0, 1),
        "dynamic_thresholding_ratio": (0.995,),
        "rescale_betas_zero_snr": (False,),
        "sample_max_value": (1.0, 1),
        "skip_prk_steps": (True, False),
        "thresholding": (False,),
        "trained_betas": (None,),
        "variance_type": ("fixed_small",),  # of DDPM's sampler, which an upscaler names for its low-resolution noise
    }

    # What diffusers takes for a field that its file leaves out, where that is not what latent diffusion uses.
    _ABSENT: ClassVar[Mapping[str, Any]] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}

    def __post_init__(self) -> None:
        for name, allowed in (
            ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("prediction_type", ("epsilon", "v_prediction")),
            ("timestep_spacing", ("leading", "trailing", "linspace")),
        ):
            if getattr(self, name) not in allowed:
                raise UnsupportedStructure(
                    f"{name}={getattr(self, name)!r} is not supported; expected one of {allowed}"
                )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        absent = {**cls._ABSENT, "set_alpha_to_one": data.get("_class_name") == "DDIMScheduler"}
        return cls(**_known_fields(cls, {**absent, **data}, cls._OFF))

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": "DDIMScheduler", "clip_sample": False, **dataclasses.asdict(self)}
